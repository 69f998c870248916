#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "api.h"

// The compilers' cpuid test also asks the operating system whether it saves the wide registers.
// Builds for other processors have the generic level alone.
#if defined(FQA_X86_LEVELS)
#define FQA_CPU_SUPPORTS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define FQA_CPU_SUPPORTS(feature) false
#endif

namespace fqa {
namespace {

constexpr const char* isa_names[] = {"generic", "avx2", "avx512", "avx512_bf16"};
constexpr Isa isa_levels[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

const char* name_of(Isa level) { return isa_names[static_cast<int>(level)]; }

Isa named_isa(const char* name) {
    for (Isa level : isa_levels)
        if (name != nullptr && std::strcmp(name, name_of(level)) == 0) return std::min(level, detected_isa());
    return detected_isa();
}

std::atomic<Isa>& chosen_isa() {
    static std::atomic<Isa> chosen{named_isa(std::getenv("FASTQADAPTER_CPU_ISA"))};
    return chosen;
}

}  // namespace

Isa detected_isa() {
    if (!(FQA_CPU_SUPPORTS("avx2") && FQA_CPU_SUPPORTS("fma"))) return Isa::generic;
    if (!(FQA_CPU_SUPPORTS("avx512f") && FQA_CPU_SUPPORTS("avx512bw") && FQA_CPU_SUPPORTS("avx512dq") &&
          FQA_CPU_SUPPORTS("avx512vl")))
        return Isa::avx2;
#if defined(FQA_X86_BF16_LEVEL)
    if (FQA_CPU_SUPPORTS("avx512bf16")) return Isa::avx512_bf16;
#endif
    return Isa::avx512;
}

Isa isa() { return chosen_isa().load(std::memory_order_relaxed); }

}  // namespace fqa

const char* fqa_detected_isa() { return fqa::name_of(fqa::detected_isa()); }
const char* fqa_isa() { return fqa::name_of(fqa::isa()); }
void fqa_set_isa(const char* name) { fqa::chosen_isa() = fqa::named_isa(name); }
