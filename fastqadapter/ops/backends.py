"""Which implementation of an op serves a call: `auto` takes the fastest that can, a named backend serves or raises.

Order of preference: `triton` (GPU kernels), `cpu` (native kernels), `torch` (chunked, any device), `eager` (plain
formulas, the truth of all tests).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastqadapter_kernels import native  # before any fork: see there

logger = logging.getLogger(__name__)

BACKENDS = ("triton", "cpu", "torch", "eager")
ENVIRONMENT_VARIABLE = "FASTQADAPTER_BACKEND"

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def _never(*args: Any, **kwargs: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One op on one backend.

    `refusal(*args)` is None, or why this call cannot be served. `auto_refusal(*args)` is None, or why `auto` passes it
    over although it could be served.
    """

    run: Callable[..., Any]
    refusal: Callable[..., str | None] = _never
    auto_refusal: Callable[..., str | None] = _never


def backends() -> dict[str, str | None]:
    """Every backend name with None where it can be used, else the reason why it cannot."""
    no_gpu = None if torch.cuda.is_available() or _interpreted() else "no CUDA or ROCm GPU is available"
    return dict.fromkeys(BACKENDS) | {"triton": _no_triton() or no_gpu, "cpu": _no_native_kernels()}


def choose(op: str, implementations: Mapping[str, Implementation], backend: str, *args: Any) -> Callable[..., Any]:
    """The function that serves this call of `op`.

    `implementations` is keyed by backend, the fastest first. `backend="auto"` reads the environment variable
    FASTQADAPTER_BACKEND, then takes the first implementation that does not refuse, and logs each refusal once.

    Raises:
        ValueError: an unknown backend, or a named one that cannot serve this call; with the reason.
    """
    asked = "backend"
    if backend == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        asked, backend = ENVIRONMENT_VARIABLE, os.environ[ENVIRONMENT_VARIABLE]
    if backend == "auto":
        for name, implementation in implementations.items():
            reason = implementation.refusal(*args) or implementation.auto_refusal(*args)
            if reason is None:
                return implementation.run
            if not torch.compiler.is_compiling():
                _log_refusal_once(op, name, reason)
        raise ValueError(f"no backend can serve this call of {op}")
    if backend not in BACKENDS:
        raise ValueError(f"{asked}={backend!r} is not one of 'auto', {', '.join(map(repr, BACKENDS))}")
    reason = implementations[backend].refusal(*args) if backend in implementations else f"it has no {op}"
    if reason is not None:
        raise ValueError(f"{asked}={backend!r} cannot serve {op}: {reason}")
    return implementations[backend].run


@functools.cache
def _log_refusal_once(op: str, backend: str, reason: str) -> None:
    logger.info("%s: backend %r passed over: %s", op, backend, reason)


# --- the backends with kernels, none of which is imported before it serves a call -------------------------------------


def fused_implementations(op: str, run: Callable[..., Any]) -> dict[str, Implementation]:
    """The kernels of `op` on GPUs and on CPUs; `run` takes the name of the backend first.

    Both are refused where the installation or the call does not allow them. `auto` also passes over Triton's where
    their first use on the device went wrong.
    """

    def triton_auto_refusal(*args: Any) -> str | None:
        tensor = next(_tensors(args))
        if tensor.device.type != "cuda":
            return "on CPU tensors it runs under Triton's interpreter, which is for tests"
        from fastqadapter.ops.fused.first_use import failure

        return failure(op, tensor.device, tensor.dtype)

    return {
        "triton": Implementation(functools.partial(run, "triton"), _triton_refusal, triton_auto_refusal),
        "cpu": Implementation(functools.partial(run, "cpu"), _cpu_refusal),
    }


def _triton_refusal(*args: Any) -> str | None:
    if (reason := _no_triton() or _float64(args)) is not None:
        return reason
    for tensor in _tensors(args):
        if tensor.device.type == "cuda":
            if not torch.version.hip and torch.cuda.get_device_capability(tensor.device) < (8, 0):
                return "it needs a GPU of compute capability 8.0 or higher"
        elif tensor.device.type != "cpu" or not _interpreted():
            return f"it needs tensors on a CUDA or ROCm GPU, these are on {tensor.device}"
    return other_differentiation(*args)


def _cpu_refusal(*args: Any) -> str | None:
    if (reason := _no_native_kernels() or _float64(args)) is not None:
        return reason
    for tensor in _tensors(args):
        if tensor.device.type != "cpu":
            return f"it needs tensors on the CPU, these are on {tensor.device}"
    return other_differentiation(*args)


def _float64(args: tuple[Any, ...]) -> str | None:
    wide = any(tensor.dtype == torch.float64 for tensor in _tensors(args))
    return "its kernels compute in float32, not in torch.float64" if wide else None


def other_differentiation(*args: Any) -> str | None:
    """Why a call cannot be served by what has a backward pass alone: it would let all else pass as a constant."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "it has no torch.func transforms (grad, vmap, jvp, ...)"
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _tensors(args)):
        return "it has no forward-mode derivative"
    return None


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    return (arg for arg in args if isinstance(arg, Tensor))


def _no_triton() -> str | None:
    return None if _TRITON_IS_INSTALLED else "Triton is not installed"


def _no_native_kernels() -> str | None:
    try:
        missing = native.cpu_isa() == "none"
    except ValueError as error:  # of an environment variable
        return str(error)
    return "its native library is missing or cannot be used: `fastqadapter env` says what to do" if missing else None


# As torch.compiler.assume_constant_result marks a function; calling that would import all of torch._dynamo.
_no_native_kernels.__dict__["_dynamo_marked_constant"] = True


def _interpreted() -> bool:
    """Whether kernels run on the CPU: as decided when they were imported, or as it would be decided now."""
    if (device := sys.modules.get("fastqadapter_kernels.triton.device")) is not None:
        return bool(device.INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
