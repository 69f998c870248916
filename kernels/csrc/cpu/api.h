// The C interface of the library, as fastqadapter_kernels/cpu.py declares it for ctypes: plain structs and functions.
//
// Letters as everywhere: N rows (states), M transitions, D hidden size, V vocabulary. The caller has checked shapes,
// dtypes and devices. Whatever changes here raises ABI_VERSION, here and there.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define FQA_EXPORT extern "C" __declspec(dllexport)
#else
#define FQA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace fqa {

constexpr int ABI_VERSION = 2;

enum class Dtype : int32_t { float32, bfloat16, float16 };

// A matrix anywhere in memory; strides count elements.
struct Matrix {
    const void* data;
    int64_t row_stride;
    int64_t column_stride;
    Dtype dtype;
};

struct SoftValueCall {
    Matrix hidden_q;  // (N, D)
    Matrix hidden_b;  // (N, D)
    Matrix weight;    // (V, D)
    int64_t rows, size, vocab;
    const float* bias_b;    // (V,) or null
    const float* bias_q;    // (V,) or null
    const float* base_lse;  // (N,), or null where it is to be found
    float alpha_0, alpha_tilde, logit_scale;
    float softcap;       // infinity: none
    int32_t difference;  // with a soft-cap: q = capped logits of hidden_q - capped base logits
    float* value;        // (N,)
    float* lse;          // (N,) of the base logits
    float* expected;     // (N, D) e = dv/dhidden_q, or null where it is not wanted
};

struct TakenValueCall {
    Matrix hidden;  // (N, D)
    Matrix weight;  // (V, D)
    int64_t rows, size, vocab, transitions;
    const int64_t* states;   // (M,), or null: transition t leaves state t
    const int64_t* actions;  // (M,)
    float* value;            // (M,)
};

struct HiddenGradientCall {
    Matrix weight;  // (V, D)
    int64_t rows, size, vocab, transitions;
    const int64_t* actions;   // (M,)
    const int64_t* order;     // (M,) transitions sorted by state: those of state s are order[ends[s]] to
    const int64_t* ends;      // (N + 1,) order[ends[s + 1] - 1]
    const float* grad_value;  // (N,) or null, with `expected`
    const float* expected;    // (N, D) or null
    const float* grad_taken;  // (M,)
    void* gradient;           // (N, D) of `dtype`
    Dtype dtype;
};

// Logit-level ops: rows of two (N, V) matrices of one dtype, whose columns are neighbours.
struct ResidualCall {
    Matrix q_logits, base_logits;
    int64_t rows, vocab;
    float alpha_0, alpha_tilde;
    float* value;  // (N,), or (N, V) log-probs
    float* lse;    // (N,) of the scores as the backward pass forms them: it alone can use it
};

struct ResidualBackwardCall {
    Matrix q_logits, base_logits;  // for the value
    Matrix log_probs;              // (N, V) float32, for the log-probs
    Matrix grad;                   // (N, V) float32, for the log-probs
    const float* lse;              // (N,), for the value
    const float* grad_value;       // (N,), for the value
    int64_t rows, vocab;
    float alpha_0, alpha_tilde;
    void* gradient;  // (N, V) of `dtype`
    Dtype dtype;
};

struct PreferenceLossCall {
    const float* q_taken;          // (M,)
    const float* values;           // (S,)
    const int64_t* value_rows;     // (M,), -1: terminal
    const int64_t* branch_ends;    // (2B + 1,)
    const float* divisor;          // (B,)
    const float* squares_divisor;  // (B,)
    int64_t transitions, rows, pairs;
    double gamma, beta;
    float* loss;         // ()
    float* metrics;      // (8, B)
    float* grad_q;       // (M,)
    float* grad_values;  // (S,)
};

}  // namespace fqa

FQA_EXPORT int fqa_abi_version();
FQA_EXPORT const char* fqa_detected_isa();
FQA_EXPORT const char* fqa_isa();
FQA_EXPORT void fqa_set_isa(const char* name);
// The process whose threads torch's pool has; a forked child has others.
FQA_EXPORT void fqa_set_home_process(int64_t id);

// 0, or 1 where there is no memory for its scratch.
FQA_EXPORT int fqa_soft_value(const fqa::SoftValueCall* call, int threads);
FQA_EXPORT void fqa_taken_value(const fqa::TakenValueCall* call, int threads);
FQA_EXPORT void fqa_hidden_gradient(const fqa::HiddenGradientCall* call, int threads);
FQA_EXPORT void fqa_residual_soft_value(const fqa::ResidualCall* call, int threads);
FQA_EXPORT void fqa_residual_log_probs(const fqa::ResidualCall* call, int threads);
FQA_EXPORT void fqa_residual_soft_value_bwd(const fqa::ResidualBackwardCall* call, int threads);
FQA_EXPORT void fqa_residual_log_probs_bwd(const fqa::ResidualBackwardCall* call, int threads);
FQA_EXPORT void fqa_preference_loss(const fqa::PreferenceLossCall* call);
// For the tests of the library.
FQA_EXPORT void fqa_exp(const float* x, float* y, int64_t count);
FQA_EXPORT void fqa_tanh(const float* x, float* y, int64_t count);
