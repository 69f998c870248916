// Tests of the library below Python: every level that this machine has, in memory of exactly the size that is asked
// for. CI builds and runs them with AddressSanitizer and UndefinedBehaviorSanitizer.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>

#include "level.h"
#include "reference.h"

using namespace fqa_tests;

namespace {

const char* current = "";  // level and test, for the messages

void require(bool holds, const char* what, double found = 0.0, double expected = 0.0) {
    if (holds) return;
    std::fprintf(stderr, "FAILED %s, %s: %s (found %.9g, expected %.9g)\n", fqa_isa(), current, what, found, expected);
    std::exit(1);
}

// To within `tolerance` of the largest number, or of `scale`, the size of what the numbers are differences of.
void require_close(const float* found, const Numbers& expected, double tolerance, const char* what,
                   double scale = 1e-30) {
    for (double each : expected) scale = std::max(scale, std::abs(each));
    for (size_t i = 0; i < expected.size(); ++i)
        require(std::abs(found[i] - expected[i]) <= tolerance * scale, what, found[i], expected[i]);
}

std::unique_ptr<float[]> floats(int64_t count) {
    std::unique_ptr<float[]> memory(new float[count]);
    std::fill_n(memory.get(), count, std::numeric_limits<float>::quiet_NaN());
    return memory;
}

std::unique_ptr<float[]> as_floats(const Numbers& numbers) {
    auto memory = floats(numbers.size());
    std::transform(numbers.begin(), numbers.end(), memory.get(), [](double x) { return static_cast<float>(x); });
    return memory;
}

template <class T>
std::unique_ptr<T[]> copy_of(const std::vector<T>& values) {
    std::unique_ptr<T[]> memory(new T[values.size()]);
    std::copy(values.begin(), values.end(), memory.get());
    return memory;
}

constexpr Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

// --- functions of one number -----------------------------------------------------------------------------------------

// Units in the last place of a float next to `expected`.
double ulps(float found, double expected) {
    const float nearest = static_cast<float>(expected);
    const float unit = std::nextafter(std::abs(nearest), INFINITY) - std::abs(nearest);
    return std::abs(found - expected) / unit;
}

void test_function(void (*function)(const float*, float*, int64_t), double (*truth)(double), double most_ulps) {
    for (uint32_t sign = 0; sign < 2; ++sign)
        for (uint32_t exponent = 0; exponent < 256; ++exponent)
            for (int sample = 0; sample < 257; ++sample) {
                const uint32_t mantissa = sample == 0 ? 0u : generator()() & 0x7fffffu;
                const uint32_t bits = sign << 31 | exponent << 23 | mantissa;
                float x, y;
                std::memcpy(&x, &bits, 4);
                function(&x, &y, 1);
                const double expected = truth(x);
                const float nearest = static_cast<float>(expected);
                if (std::isnan(expected))
                    require(std::isnan(y), "NaN stays NaN", y);
                else if (std::isinf(nearest) || nearest == 0.0f)
                    require(y == nearest, "infinity or zero", y, expected);
                else if (std::abs(nearest) < std::numeric_limits<float>::min())
                    require(y == 0.0f || ulps(y, expected) <= most_ulps, "a subnormal, or 0 for it", y, expected);
                else
                    require(ulps(y, expected) <= most_ulps, "ulps", ulps(y, expected), most_ulps);
            }
}

void test_functions() {
    current = "exp";
    test_function(fqa_exp, [](double x) { return std::exp(x); }, 2.0);
    current = "tanh";
    test_function(fqa_tanh, [](double x) { return std::tanh(x); }, 3.0);
}

// --- soft_value ------------------------------------------------------------------------------------------------------

struct Head {
    bool biases;
    float logit_scale, softcap;
    bool difference, known_lse;
};

void test_soft_value(int64_t rows, int64_t size, int64_t vocab, Dtype dtype, bool transposed, const Head& head,
                     double scale = 1.0) {
    const Stored hidden_q(normal(rows * size, scale), rows, size, transposed ? Dtype::float32 : dtype, transposed);
    const Stored hidden_b(normal(rows * size, scale), rows, size, dtype, transposed);
    const Stored weight(normal(vocab * size, 2.0 / std::sqrt(size)), vocab, size, dtype, transposed);
    const auto bias_b = as_floats(normal(vocab)), bias_q = as_floats(normal(vocab)), known = as_floats(normal(rows));
    auto value = floats(rows), lse = floats(rows), expected = floats(rows * size);
    fqa::SoftValueCall call = {hidden_q.matrix,
                               hidden_b.matrix,
                               weight.matrix,
                               rows,
                               size,
                               vocab,
                               head.biases ? bias_b.get() : nullptr,
                               head.biases ? bias_q.get() : nullptr,
                               head.known_lse ? known.get() : nullptr,
                               0.7f,
                               1.3f,
                               head.logit_scale,
                               head.softcap,
                               head.difference,
                               value.get(),
                               lse.get(),
                               expected.get()};
    const SoftValue truth = soft_value(call, hidden_q, hidden_b, weight);
    // With a known lse, or float32 states on a 16-bit head, the states are rounded to the dtype of W.
    // What logits are off by grows with them.
    const double rounding = scale * (dtype == Dtype::float32 ? 1e-5 : transposed || head.known_lse ? 3e-2 : 1e-4);
    require(fqa_soft_value(&call, 1) == 0, "memory");
    require_close(value.get(), truth.value, rounding, "value", 1.0);
    require_close(lse.get(), truth.lse, 1e-5, "lse");
    require_close(expected.get(), truth.expected, dtype == Dtype::float32 ? scale * 1e-5 : 3e-2, "expected");

    auto again = floats(rows), again_lse = floats(rows), again_expected = floats(rows * size);
    call.value = again.get(), call.lse = again_lse.get(), call.expected = again_expected.get();
    require(fqa_soft_value(&call, 3) == 0, "memory");
    require(std::equal(value.get(), value.get() + rows, again.get()), "value with three threads");
    require(std::equal(lse.get(), lse.get() + rows, again_lse.get()), "lse with three threads");
    require(std::equal(expected.get(), expected.get() + rows * size, again_expected.get()), "e with three threads");
    call.expected = nullptr;
    require(fqa_soft_value(&call, 3) == 0, "memory");
    require(std::equal(value.get(), value.get() + rows, again.get()), "value without gradient");
}

void test_soft_values() {
    current = "soft_value";
    const float no_cap = INFINITY;
    const Head heads[] = {{false, 1.0f, no_cap, false, false},
                          {true, -0.4f, no_cap, false, false},
                          {true, 0.5f, 3.0f, true, false},
                          {false, 1.0f, no_cap, false, true},
                          {true, 1.0f, 3.0f, false, true}};
    const int64_t shapes[][3] = {{1, 1, 1}, {2, 3, 5}, {17, 33, 129}, {33, 16, 1000}, {70, 101, 257}, {5, 700, 40}};
    for (Dtype dtype : dtypes)
        for (const Head& head : heads)
            for (const auto& [rows, size, vocab] : shapes)
                for (bool transposed : {false, true}) test_soft_value(rows, size, vocab, dtype, transposed, head);
    // Several tiles in each part, and logits that differ by hundreds: the shifts of sums rise from tile to tile.
    for (Dtype dtype : dtypes)
        for (double scale : {1.0, 60.0}) test_soft_value(9, 20, 3000, dtype, false, heads[0], scale);
}

// --- the other ops ---------------------------------------------------------------------------------------------------

void test_taken_value(Dtype dtype) {
    current = "taken_value and hidden_gradient";
    const int64_t rows = 7, size = 1030, vocab = 11, transitions = 9;
    const Stored hidden(normal(rows * size), rows, size, dtype), weight(normal(vocab * size), vocab, size, dtype);
    const std::vector<int64_t> states = {0, 0, 1, 3, 3, 3, 6, 5, 2}, actions = {10, 0, 1, 2, 2, 3, 4, vocab, -1};
    const std::vector<int64_t> order = {0, 1, 2, 8, 3, 4, 5, 7, 6}, ends = {0, 2, 3, 4, 7, 7, 8, 9};
    const auto states_memory = copy_of(states), actions_memory = copy_of(actions), order_memory = copy_of(order),
               ends_memory = copy_of(ends);
    auto value = floats(transitions);
    const fqa::TakenValueCall call = {hidden.matrix,       weight.matrix,        rows,       size, vocab, transitions,
                                      states_memory.get(), actions_memory.get(), value.get()};
    fqa_taken_value(&call, 2);
    const auto grad_value = as_floats(normal(rows)), grad_taken = as_floats(normal(transitions)),
               expected = as_floats(normal(rows * size));
    Numbers gradient(rows * size);
    for (int64_t i = 0; i < rows * size; ++i) gradient[i] = grad_value[i / size] * expected[i];
    for (int64_t t = 0; t < transitions; ++t) {
        if (actions[t] < 0 || actions[t] >= vocab) {
            require(std::isnan(value[t]), "an action outside", value[t]);
            continue;
        }
        double dot = 0.0;
        for (int64_t d = 0; d < size; ++d) {
            dot += hidden.numbers[states[t] * size + d] * weight.numbers[actions[t] * size + d];
            gradient[states[t] * size + d] += grad_taken[t] * weight.numbers[actions[t] * size + d];
        }
        require(std::abs(value[t] - dot) <= 1e-4 * std::sqrt(size), "value", value[t], dot);
    }
    for (Dtype of_gradient : dtypes) {
        std::unique_ptr<char[]> memory(new char[rows * size * size_of(of_gradient)]);
        const fqa::HiddenGradientCall backward = {weight.matrix,
                                                  rows,
                                                  size,
                                                  vocab,
                                                  transitions,
                                                  actions_memory.get(),
                                                  order_memory.get(),
                                                  ends_memory.get(),
                                                  grad_value.get(),
                                                  expected.get(),
                                                  grad_taken.get(),
                                                  memory.get(),
                                                  of_gradient};
        fqa_hidden_gradient(&backward, 2);
        if (of_gradient == Dtype::float32)
            require_close(reinterpret_cast<const float*>(memory.get()), gradient, 1e-5, "gradient");
    }
}

void test_residual(int64_t rows, int64_t vocab, Dtype dtype) {
    current = "residual";
    const Stored q(normal(rows * vocab, 3.0), rows, vocab, dtype), b(normal(rows * vocab, 3.0), rows, vocab, dtype);
    auto value = floats(rows), lse = floats(rows), log_probs = floats(rows * vocab);
    fqa::ResidualCall call = {q.matrix, b.matrix, rows, vocab, 0.7f, 1.3f, value.get(), lse.get()};
    fqa_residual_soft_value(&call, 2);
    call.value = log_probs.get();
    fqa_residual_log_probs(&call, 2);
    const auto grad_value = as_floats(normal(rows)), grad = as_floats(normal(rows * vocab));
    Numbers true_value, true_log_probs, of_value, of_log_probs;
    for (int64_t n = 0; n < rows; ++n) {
        Numbers scores, base(b.numbers.begin() + n * vocab, b.numbers.begin() + (n + 1) * vocab);
        double sum_of_grad = 0.0;
        for (int64_t v = 0; v < vocab; ++v) {
            scores.push_back((q.numbers[n * vocab + v] + double(0.7f) * base[v]) / double(1.3f));
            sum_of_grad += grad[n * vocab + v];
        }
        const double of_scores = log_sum_exp(scores);
        true_value.push_back(double(1.3f) * of_scores - double(0.7f) * log_sum_exp(base));
        for (int64_t v = 0; v < vocab; ++v) {
            const double p = std::exp(scores[v] - of_scores);
            true_log_probs.push_back(scores[v] - of_scores);
            of_value.push_back(grad_value[n] * p);
            of_log_probs.push_back((grad[n * vocab + v] - p * sum_of_grad) / double(1.3f));
        }
    }
    require_close(value.get(), true_value, 1e-5, "value");
    require_close(log_probs.get(), true_log_probs, 1e-5, "log-probs");
    for (Dtype of_gradient : dtypes) {
        std::unique_ptr<char[]> memory(new char[rows * vocab * size_of(of_gradient)]);
        fqa::ResidualBackwardCall backward = {};
        backward.q_logits = q.matrix, backward.base_logits = b.matrix;
        backward.log_probs = {log_probs.get(), vocab, 1, Dtype::float32};
        backward.grad = {grad.get(), vocab, 1, Dtype::float32};
        backward.lse = lse.get(), backward.grad_value = grad_value.get();
        backward.rows = rows, backward.vocab = vocab, backward.alpha_0 = 0.7f, backward.alpha_tilde = 1.3f;
        backward.gradient = memory.get(), backward.dtype = of_gradient;
        const float* found = reinterpret_cast<const float*>(memory.get());
        fqa_residual_soft_value_bwd(&backward, 2);
        if (of_gradient == Dtype::float32) require_close(found, of_value, 1e-5, "gradient of the value");
        fqa_residual_log_probs_bwd(&backward, 2);
        if (of_gradient == Dtype::float32) require_close(found, of_log_probs, 1e-5, "gradient of the log-probs");
    }
}

void test_preference_loss() {
    current = "preference_loss";
    // One pair: rewards 1 - 0.5 * 2 = 0 and 3 chosen, 1 rejected; margin (3 - 1) / 2 = 1.
    const auto q_taken = as_floats({1.0, 3.0, 1.0}), values = as_floats({9.0, 2.0}), two = as_floats({2.0});
    const auto rows = copy_of<int64_t>({1, -1, -1}), ends = copy_of<int64_t>({0, 2, 3}),
               bad = copy_of<int64_t>({0, 9, 3});
    auto loss = floats(1), metrics = floats(8), grad_q = floats(3), grad_values = floats(2);
    fqa::PreferenceLossCall call = {
        q_taken.get(), values.get(), rows.get(), ends.get(),    two.get(),    two.get(),        3, 2, 1,
        0.5,           0.1,          loss.get(), metrics.get(), grad_q.get(), grad_values.get()};
    fqa_preference_loss(&call);
    const double slope = -1.0 / (1.0 + std::exp(1.0)) / 2.0,
                 expected = std::log1p(std::exp(-1.0)) + 0.1 * (9.0 + 1.0) / 2;
    require_close(loss.get(), {expected}, 1e-6, "loss");
    require_close(grad_q.get(), {slope, slope + 0.1 * 3.0, -slope + 0.1}, 1e-6, "gradient of q");
    require_close(grad_values.get(), {0.0, -0.5 * slope}, 1e-6, "gradient of the values");
    call.branch_ends = bad.get();
    fqa_preference_loss(&call);
    require(std::isnan(loss[0]), "ends outside", loss[0]);
}

}  // namespace

int main() {
    const std::string best = fqa_detected_isa();
    for (const char* level : {"generic", "avx2", "avx512", "avx512_bf16"}) {
        fqa_set_isa(level);
        if (std::string(fqa_isa()) != level) continue;
        test_functions();
        test_soft_values();
        for (Dtype dtype : dtypes) {
            test_taken_value(dtype);
            for (const auto& [rows, vocab] : {std::pair<int64_t, int64_t>{1, 1}, {3, 37}, {2, 2048}, {5, 5000}})
                test_residual(rows, vocab, dtype);
        }
        test_preference_loss();
        std::printf("%s: passed\n", level);
        if (level == best) break;
    }
}
