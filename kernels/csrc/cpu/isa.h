// The instruction set that the kernels use, chosen once per process.
#pragma once

namespace fqa {

// Ordered: each level can run the code of those before it. avx512_bf16 is avx512 with the dot product of bf16 pairs.
enum class Isa { generic, avx2, avx512, avx512_bf16 };

// The best level that this build has and that this processor and its operating system can run.
Isa detected_isa();

// The level in use: detected_isa(), or a lower one named by the environment variable FASTQADAPTER_CPU_ISA.
// A name above detected_isa(), or one that does not exist, changes nothing.
Isa isa();

}  // namespace fqa
