// The ops in float64, as their formulas say; and memory in which every access outside is seen by AddressSanitizer.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "api.h"

namespace fqa_tests {

using fqa::Dtype;
using fqa::Matrix;
using Numbers = std::vector<double>;

inline std::mt19937& generator() {
    static std::mt19937 engine(7);
    return engine;
}

inline Numbers normal(int64_t count, double scale = 1.0) {
    std::normal_distribution<double> distribution(0.0, scale);
    Numbers numbers(count);
    for (double& number : numbers) number = distribution(generator());
    return numbers;
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Only numbers that the dtype has: a float with as many of its bits as the dtype keeps.
inline float rounded(double x, Dtype dtype) {
    const float number = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    if (dtype == Dtype::bfloat16) bits &= 0xffff0000u;
    if (dtype == Dtype::float16) bits &= 0xffffe000u;
    float result;
    std::memcpy(&result, &bits, 4);
    return dtype == Dtype::float16 && std::abs(result) < 0x1p-14f ? 0.0f : result;
}

inline void write_as(Dtype dtype, float x, char* to) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == Dtype::float16)
        half = x == 0.0f
                   ? static_cast<uint16_t>((bits >> 16) & 0x8000u)
                   : static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
    if (dtype == Dtype::float32)
        std::memcpy(to, &x, 4);
    else
        std::memcpy(to, &half, 2);
}

// A matrix of `dtype` in a block of exactly its size; `transposed` has its rows next to each other.
struct Stored {
    Numbers numbers;  // what it holds, row by row
    std::unique_ptr<char[]> memory;
    Matrix matrix;

    Stored(const Numbers& values, int64_t rows, int64_t columns, Dtype dtype, bool transposed = false)
        : numbers(values), memory(new char[rows * columns * size_of(dtype)]) {
        const int64_t row_stride = transposed ? 1 : columns, column_stride = transposed ? rows : 1;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) {
                const float x = rounded(values[i * columns + j], dtype);
                numbers[i * columns + j] = x;
                write_as(dtype, x, memory.get() + (i * row_stride + j * column_stride) * size_of(dtype));
            }
        matrix = {memory.get(), row_stride, column_stride, dtype};
    }
};

inline double log_sum_exp(const Numbers& x) {
    double most = -INFINITY, total = 0.0;
    for (double each : x) most = std::max(most, each);
    for (double each : x) total += std::exp(each - most);
    return most + std::log(total);
}

struct SoftValue {
    Numbers value, lse, expected;
};

inline SoftValue soft_value(const fqa::SoftValueCall& call, const Stored& hidden_q, const Stored& hidden_b,
                            const Stored& weight) {
    SoftValue result;
    for (int64_t n = 0; n < call.rows; ++n) {
        Numbers b(call.vocab), scores(call.vocab), slopes(call.vocab);
        for (int64_t v = 0; v < call.vocab; ++v) {
            double q = call.bias_q == nullptr ? 0.0 : call.bias_q[v];
            b[v] = call.bias_b == nullptr ? 0.0 : call.bias_b[v];
            for (int64_t d = 0; d < call.size; ++d) {
                q += hidden_q.numbers[n * call.size + d] * weight.numbers[v * call.size + d];
                b[v] += hidden_b.numbers[n * call.size + d] * weight.numbers[v * call.size + d];
            }
            q *= call.logit_scale, b[v] *= call.logit_scale;
            slopes[v] = 1.0;
            if (std::isfinite(call.softcap)) {
                const double cap = call.softcap;
                slopes[v] = 1.0 - std::pow(std::tanh(q / cap), 2);
                q = cap * std::tanh(q / cap), b[v] = cap * std::tanh(b[v] / cap);
            }
            if (call.difference != 0) q -= b[v];
            scores[v] = (q + call.alpha_0 * b[v]) / call.alpha_tilde;
        }
        const double lse = log_sum_exp(scores), base = call.base_lse == nullptr ? log_sum_exp(b) : call.base_lse[n];
        result.lse.push_back(base);
        result.value.push_back(call.alpha_tilde * lse - call.alpha_0 * base);
        for (int64_t d = 0; d < call.size; ++d) {
            double e = 0.0;
            for (int64_t v = 0; v < call.vocab; ++v)
                e += std::exp(scores[v] - lse) * slopes[v] * weight.numbers[v * call.size + d];
            result.expected.push_back(call.logit_scale * e);
        }
    }
    return result;
}

}  // namespace fqa_tests
