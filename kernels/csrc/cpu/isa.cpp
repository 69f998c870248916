#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

// The compilers' cpuid test also asks the operating system whether it saves the wide registers.
// Other compilers and processors get the generic level.
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define FQA_CPU_SUPPORTS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define FQA_CPU_SUPPORTS(feature) false
#endif

namespace fqa {
namespace {

constexpr const char* isa_names[] = {"generic", "avx2", "avx512"};
constexpr Isa isa_levels[] = {Isa::generic, Isa::avx2, Isa::avx512};

const char* name_of(Isa level) { return isa_names[static_cast<int>(level)]; }

Isa chosen_isa() {
    if (const char* wanted = std::getenv("FASTQADAPTER_CPU_ISA"))
        for (Isa level : isa_levels)
            if (std::strcmp(wanted, name_of(level)) == 0) return std::min(level, detected_isa());
    return detected_isa();
}

}  // namespace

Isa detected_isa() {
    const bool avx2 = FQA_CPU_SUPPORTS("avx2") && FQA_CPU_SUPPORTS("fma");
    const bool avx512 = avx2 && FQA_CPU_SUPPORTS("avx512f") && FQA_CPU_SUPPORTS("avx512bw") &&
                        FQA_CPU_SUPPORTS("avx512dq") && FQA_CPU_SUPPORTS("avx512vl");
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::generic;
}

Isa isa() {
    static const Isa chosen = chosen_isa();
    return chosen;
}

bool has_avx512_bf16() { return isa() == Isa::avx512 && FQA_CPU_SUPPORTS("avx512bf16"); }

}  // namespace fqa

FQA_EXPORT const char* fqa_detected_isa() { return fqa::name_of(fqa::detected_isa()); }
FQA_EXPORT const char* fqa_isa() { return fqa::name_of(fqa::isa()); }
FQA_EXPORT int fqa_has_avx512_bf16() { return fqa::has_avx512_bf16(); }
