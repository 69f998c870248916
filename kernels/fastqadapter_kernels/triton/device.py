"""What a launcher must know of the device that it launches on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastqadapter_kernels.triton import online

INFINITY_CACHE_BYTES = {"gfx942": 256 << 20, "gfx950": 256 << 20}  # AMD CDNA 3 white paper

# Decided by the environment variable TRITON_INTERPRET when the kernels were imported: then they run on CPU tensors.
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
    def has_tma(self) -> bool:
        """Hopper and the Blackwell of data centres. sm_120 has TMA, but neither their products nor their memory."""
        return 90 <= self.capability < 120 or self.arch == "interpreter"

    @property
    def is_hip(self) -> bool:
        return self.arch.startswith("gfx")


def launch_options(hw: Hardware, num_warps: int, *, fp_fusion: bool = True) -> dict[str, int | bool]:
    """Options of a launch that do not depend on the kernel, beside `fp_fusion`: whether products and sums may become
    one instruction that rounds once.

    `maxnreg` is what the registers of a multiprocessor allow one block, so it binds nothing; but without it ptxas
    guesses at a number of blocks and spills a dozen registers to reach it.
    """
    options: dict[str, int | bool] = {"num_warps": num_warps, "enable_fp_fusion": fp_fusion}
    return {**options, "maxnreg": min(255, 65536 // (32 * num_warps))} if hw.capability else options


Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_its_device(launcher: Launcher) -> Launcher:
    """Launch on the device of the tensors, since Triton takes the current one, whatever the tensors are on; and without
    autocast, which would turn a product of fp32 into one of 16 bit."""

    @functools.wraps(launcher)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        kind = tensor.device.type
        with torch.cuda.device_of(tensor), torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            return launcher(*args, **kwargs)

    return guarded  # type: ignore[return-value]


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
