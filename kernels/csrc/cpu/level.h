// The kernels of one instruction set.
#pragma once

#include "api.h"
#include "isa.h"

namespace fqa {

struct Level {
    bool (*soft_value)(const SoftValueCall&, int threads);
    void (*taken_value)(const TakenValueCall&, int threads);
    void (*hidden_gradient)(const HiddenGradientCall&, int threads);
    void (*residual_soft_value)(const ResidualCall&, int threads);
    void (*residual_log_probs)(const ResidualCall&, int threads);
    void (*residual_soft_value_bwd)(const ResidualBackwardCall&, int threads);
    void (*residual_log_probs_bwd)(const ResidualBackwardCall&, int threads);
    void (*exp)(const float* x, float* y, int64_t count);
    void (*tanh)(const float* x, float* y, int64_t count);
};

extern const Level generic_level;
#if defined(FQA_X86_LEVELS)
extern const Level avx2_level, avx512_level;
#endif
#if defined(FQA_X86_BF16_LEVEL)
extern const Level avx512_bf16_level;
#endif

}  // namespace fqa
