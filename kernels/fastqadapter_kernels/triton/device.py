"""What a launcher must know of the device that it launches on."""

from __future__ import annotations

import dataclasses
import functools

import torch
from triton.runtime.jit import JITFunction

from fastqadapter_kernels.triton import online

# Decided by the environment variable TRITON_INTERPRET when the kernels were imported: then they run on CPU tensors.
INFINITY_CACHE_BYTES = {"gfx942": 256 << 20, "gfx950": 256 << 20}  # AMD CDNA 3 white paper

INTERPRETED = not isinstance(online.tanh, JITFunction)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The facts that the configuration rules use."""

    arch: str  # sm_80, sm_90, ... for CUDA, gfx942, ... for ROCm, "interpreter" for CPU tensors
    multiprocessors: int
    cache_bytes: int  # the last cache that all multiprocessors share

    @property
    def capability(self) -> int:
        """80 for sm_80, 100 for sm_100; 0 where it is no CUDA device."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def is_hip(self) -> bool:
        return self.arch.startswith("gfx")


@functools.cache
def hardware(device: torch.device) -> Hardware:
    """The hardware of a CUDA or ROCm device; a stand-in with tiny tiles for the interpreter's CPU."""
    if device.type != "cuda":
        return Hardware("interpreter", 2, 16 << 10)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch, cache_bytes = properties.gcnArchName.split(":")[0], properties.L2_cache_size
        if arch in INFINITY_CACHE_BYTES:  # the L2 cache is one of several, each shared by some compute units
            cache_bytes = INFINITY_CACHE_BYTES[arch]
        return Hardware(arch, properties.multi_processor_count, cache_bytes)
    arch = f"sm_{properties.major}{properties.minor}"
    return Hardware(arch, properties.multi_processor_count, properties.L2_cache_size)
