#include "api.h"

#include "level.h"
#include "preference_loss.h"

namespace fqa {
namespace {

const Level& level() {
#if defined(FQA_X86_LEVELS)
    switch (isa()) {
        case Isa::avx512_bf16:
#if defined(FQA_X86_BF16_LEVEL)
            return avx512_bf16_level;
#endif
        case Isa::avx512:
            return avx512_level;
        case Isa::avx2:
            return avx2_level;
        case Isa::generic:
            break;
    }
#endif
    return generic_level;
}

}  // namespace
}  // namespace fqa

using fqa::level;

int fqa_abi_version() { return fqa::ABI_VERSION; }

int fqa_soft_value(const fqa::SoftValueCall* call, int threads) { return level().soft_value(*call, threads) ? 0 : 1; }

void fqa_taken_value(const fqa::TakenValueCall* call, int threads) { level().taken_value(*call, threads); }

void fqa_hidden_gradient(const fqa::HiddenGradientCall* call, int threads) { level().hidden_gradient(*call, threads); }

void fqa_residual_soft_value(const fqa::ResidualCall* call, int threads) {
    level().residual_soft_value(*call, threads);
}

void fqa_residual_log_probs(const fqa::ResidualCall* call, int threads) { level().residual_log_probs(*call, threads); }

void fqa_residual_soft_value_bwd(const fqa::ResidualBackwardCall* call, int threads) {
    level().residual_soft_value_bwd(*call, threads);
}

void fqa_residual_log_probs_bwd(const fqa::ResidualBackwardCall* call, int threads) {
    level().residual_log_probs_bwd(*call, threads);
}

void fqa_preference_loss(const fqa::PreferenceLossCall* call) { fqa::preference_loss(*call); }

void fqa_exp(const float* x, float* y, int64_t count) { level().exp(x, y, count); }

void fqa_tanh(const float* x, float* y, int64_t count) { level().tanh(x, y, count); }
