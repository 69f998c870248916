// All vector kernels, compiled once for each instruction set: CMakeLists.txt names the level, its lanes and its flags.
//
// Nothing here may call an inline function or a template of the standard library: its code, compiled for one level,
// could be the copy that the linker keeps for all.
#include "level.h"

#include <stdlib.h>

#include "parallel.h"

#if defined(FQA_BF16_DOT)
#include <immintrin.h>
#endif

#define FQA_JOIN(a, b) a##b
#define FQA_LEVEL_TABLE(level) FQA_JOIN(level, _level)

namespace fqa {
namespace FQA_LEVEL {
namespace {

#include "vec.h"

#include "vec_math.h"

#include "scratch.h"

#include "gemm.h"

#include "online_softmax.h"

#include "soft_value_pass.h"

#include "soft_value_sweep.h"

#include "soft_value.h"

#include "taken_value.h"

#include "residual.h"

bool soft_value_of_dtype(const SoftValueCall& call, int threads) {
#if defined(FQA_BF16_DOT)
    if (call.weight.dtype == Dtype::bfloat16) return soft_value<Bf16Pairs>(call, threads);
#endif
    return soft_value<FloatWords>(call, threads);
}

template <Floats (*function)(Floats)>
void each(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t rest = smaller(LANES, count - i);
        store_first(y + i, rest, function(load_first(x + i, rest, 0.0f)));
    }
}

}  // namespace
}  // namespace FQA_LEVEL

extern const Level FQA_LEVEL_TABLE(FQA_LEVEL) = {
    FQA_LEVEL::soft_value_of_dtype,    FQA_LEVEL::taken_value,          FQA_LEVEL::hidden_gradient,
    FQA_LEVEL::residual_soft_value,    FQA_LEVEL::residual_log_probs,   FQA_LEVEL::residual_soft_value_bwd,
    FQA_LEVEL::residual_log_probs_bwd, FQA_LEVEL::each<FQA_LEVEL::exp>, FQA_LEVEL::each<FQA_LEVEL::tanh>,
};

}  // namespace fqa
