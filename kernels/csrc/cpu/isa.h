// The instruction set that the kernels use, chosen once per process.
#pragma once

#if defined(_WIN32)
#define FQA_EXPORT extern "C" __declspec(dllexport)
#else
#define FQA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace fqa {

// Ordered: each level can run the code of those before it.
enum class Isa { generic, avx2, avx512 };

// The best level that this processor and its operating system can run.
Isa detected_isa();

// The level in use: detected_isa(), or a lower one named by the environment variable FASTQADAPTER_CPU_ISA.
// A name above detected_isa(), or one that does not exist, changes nothing.
Isa isa();

// Whether kernels may use the bf16 dot product; false below avx512.
bool has_avx512_bf16();

}  // namespace fqa
