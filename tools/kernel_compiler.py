"""Compiles Triton kernels for GPUs that this machine need not have, just as their launchers would launch them.

`recorded_launches` runs a launcher on meta tensors as if on a given GPU and keeps what it would launch: kernel,
arguments, configuration. `compile_launch` compiles that for the GPU, and reads registers, spills, shared memory and
instructions from the machine code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastqadapter_kernels.triton.device import Hardware

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Limits of a target, from NVIDIA's CUDA programming guide (compute capabilities) and AMD's CDNA ISA guides."""

    name: str
    target: GPUTarget
    multiprocessors: int
    shared_per_block: int  # bytes
    shared_per_multiprocessor: int  # bytes
    registers: int  # 32-bit, per multiprocessor (CUDA) or per lane of a SIMD (ROCm)
    threads: int  # per multiprocessor
    cache_bytes: int
    tensor_core: str  # instruction that a matrix kernel in 16 bit must use

    @property
    def hardware(self) -> Hardware:
        arch = str(self.target.arch)
        return Hardware(f"sm_{arch}" if self.target.backend == "cuda" else arch, self.multiprocessors, self.cache_bytes)


GPUS = {
    "sm_80": Gpu("A100", GPUTarget("cuda", 80, 32), 108, 163 << 10, 164 << 10, 65536, 2048, 40 << 20, "HMMA"),
    "sm_90": Gpu("H100", GPUTarget("cuda", 90, 32), 132, 227 << 10, 228 << 10, 65536, 2048, 50 << 20, "HGMMA"),
    "sm_100": Gpu("B200", GPUTarget("cuda", 100, 32), 148, 227 << 10, 228 << 10, 65536, 2048, 126 << 20, "UTCHMMA"),
    "sm_120": Gpu("RTX 5090", GPUTarget("cuda", 120, 32), 170, 99 << 10, 100 << 10, 65536, 1536, 96 << 20, "HMMA"),
    "gfx942": Gpu("MI300X", GPUTarget("hip", "gfx942", 64), 304, 64 << 10, 64 << 10, 512, 2048, 256 << 20, "v_mfma"),
    "gfx950": Gpu("MI350X", GPUTarget("hip", "gfx950", 64), 256, 160 << 10, 160 << 10, 512, 2048, 256 << 20, "v_mfma"),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel as it would be compiled; equal launches need compiling once."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[str, str], ...]  # argument and what the JIT has seen of it: a multiple of 16, small, ...
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the machine code of one launch needs and contains."""

    registers: int
    spills: int  # bytes of stack, or spilled registers
    shared: int  # bytes per block
    blocks: int  # that fit on one multiprocessor
    instructions: dict[str, int]


def _backend(target: GPUTarget) -> Any:
    """Triton's compiler class for a target."""
    return next(found.compiler for found in backends.values() if found.compiler.supports_target(target))


def _specialised(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any], backend: Any) -> Launch:
    """Types and specialisations of the arguments, as the JIT derives them at a launch."""
    signature, constants, attributes = [], [], []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            kind, key = "constexpr", ""
        else:
            kind, key = native_specialize_impl(backend, value, False, not parameter.do_not_specialize, True)
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append((parameter.name, value))
        elif isinstance(key, str) and key:
            attributes.append((parameter.name, key))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(attributes), tuple(options.items()))


@contextlib.contextmanager
def recorded_launches(gpu: Gpu) -> Iterator[list[Launch]]:
    """Within it, launchers of kernels launch nothing and believe to be on `gpu`; yields what they would launch."""
    launches: list[Launch] = []
    backend = _backend(gpu.target)

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        names = [parameter.name for parameter in kernel.params]
        launch = _specialised(kernel, {**dict(zip(names, args, strict=False)), **kwargs}, options, backend)
        if launch not in launches:
            launches.append(launch)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        for module in LAUNCHER_MODULES:
            stack.enter_context(mock.patch.object(module, "hardware", lambda device: gpu.hardware))
        yield launches


LAUNCHER_MODULES: list[Any] = []  # modules whose `hardware` the launchers call


def compile_launch(launch: Launch, gpu: Gpu) -> Report:
    """Compile for `gpu`; raises what the compiler raises."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(names.index(name),): _backend(gpu.target).parse_attr(key) for name, key in launch.attributes},
    )
    options = dict(launch.options)
    compiled = triton.compile(source, target=gpu.target, options=options)
    read = _read_cubin if gpu.target.backend == "cuda" else _read_amdgcn
    return read(compiled, gpu, compiled.metadata.num_warps)


def _count(assembly: str, patterns: dict[str, str]) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in patterns.items()}
    return {name: count for name, count in counts.items() if count}


NVIDIA_INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA\b",
    "UTCHMMA": r"\bUTCHMMA\b",
    "HMMA": r"\bHMMA\b",
    "UTMALDG": r"\bUTMALDG\b",
    "LDGSTS": r"\bLDGSTS\b",
    "LDG.128": r"\bLDG\.E\.\S*128",
    "LDG.256": r"\bLDG\.E\.\S*256",
    "LDG.64": r"\bLDG\.E\.\S*\b64\b",
    "LDG.32": r"\bLDG\.E(?!\S*(?:128|256|\b64\b|U16|U8|S16|S8))\S*\s",
    "LDG.16": r"\bLDG\.E\.\S*U16",
    "STG.128": r"\bSTG\.E\.\S*128",
    "spill": r"\b(?:STL|LDL)\b",
}
AMD_INSTRUCTIONS = {
    "v_mfma": r"\bv_mfma_\w+",
    "load.128": r"\b(?:global|buffer)_load_dwordx4\b",
    "load.64": r"\b(?:global|buffer)_load_dwordx2\b",
    "load.32": r"\b(?:global|buffer)_load_dword\b",
    "load.16": r"\b(?:global|buffer)_load_(?:ushort|short_d16\w*|short)\b",
    "store.128": r"\b(?:global|buffer)_store_dwordx4\b",
}


def _read_cubin(compiled: Any, gpu: Gpu, num_warps: int) -> Report:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    stack = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
    shared, threads = compiled.metadata.shared, 32 * num_warps
    blocks = min(
        gpu.registers // (-(-registers // 8) * 8 * threads),
        gpu.shared_per_multiprocessor // (shared + 1024),  # CUDA keeps 1 KiB of each block for itself
        gpu.threads // threads,
        32,
    )
    instructions = _count(sass, NVIDIA_INSTRUCTIONS)
    return Report(registers, stack + instructions.pop("spill", 0), shared, blocks, instructions)


def _read_amdgcn(compiled: Any, gpu: Gpu, num_warps: int) -> Report:
    assembly = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    registers = number("vgpr_count") + number("agpr_count")
    # Spilled scalar registers go to lanes of vector registers, not to memory.
    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    shared = compiled.metadata.shared
    waves = min(8, gpu.registers // max(8, -(-registers // 8) * 8))  # per SIMD; a multiprocessor has four
    blocks = min(4 * waves // num_warps, gpu.shared_per_multiprocessor // max(shared, 1))
    return Report(registers, spills, shared, blocks, _count(assembly, AMD_INSTRUCTIONS))
