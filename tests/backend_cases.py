"""The backends that the tests of all ops go through, and what each of them needs.

`triton` runs on the GPU where there is one, else under Triton's interpreter (see conftest.py); `cpu` needs the native
library. Both compute in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

BACKENDS = ("eager", "torch", "triton", "cpu")
FUSED_BACKENDS = ("triton", "cpu")
FAST_BACKENDS = BACKENDS[1:]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
# Backends with a derivative that finite differences can check.
each_float64_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in FUSED_BACKENDS])


def _pairs(backends: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in backends
        for dtype in DTYPES
        if serves(backend, dtype)
    ]


def serves(backend: str, dtype: torch.dtype) -> bool:
    return not (backend in FUSED_BACKENDS and dtype == torch.float64)


def wide(backend: str) -> torch.dtype:
    """The widest dtype that the backend computes in."""
    return torch.float64 if serves(backend, torch.float64) else torch.float32


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def move(backend: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors on the device of the backend; those on the meta device stay there."""
    return [x if x.device.type == "meta" else x.to(device_of(backend)) for x in tensors]


def place(backend: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors on the device of the backend, floating ones in its widest dtype."""
    return [x.to(wide(backend)) if x.is_floating_point() else x for x in move(backend, *tensors)]


def tolerance(backend: str) -> float:
    """For numbers of size 1 that are computed by hand."""
    return 1e-14 if wide(backend) == torch.float64 else 2e-6


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of the dtype of `actual`; `expected` may be float64."""
    torch.testing.assert_close(actual.cpu(), expected.to(actual.dtype))


each_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), _pairs(BACKENDS))
each_fast_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), _pairs(FAST_BACKENDS))
