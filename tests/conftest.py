"""Fixtures that several test files use."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

from fastqadapter_kernels import native


def pytest_configure() -> None:
    # The tensors of the tests are tiny: more threads only wait for each other (60 s instead of 8 s on busy cores).
    torch.set_num_threads(1)
    # A name that is no folder is asked of the hub, five times over, where there is no network (20 s a test).
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Triton decides when a kernel is defined whether it is compiled for a GPU or interpreted on the CPU.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def usable_backend(request: pytest.FixtureRequest) -> None:
    """Skip what asks for a backend that this installation has not: Triton, or the native library."""
    backend = getattr(getattr(request.node, "callspec", None), "params", {}).get("backend")
    if backend in ("triton", "cpu") and (reason := importlib.import_module("fastqadapter.ops").backends()[backend]):
        pytest.skip(f"no backend {backend} here: {reason}")


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has."""
    before = native.cpu_isa()
    used = native.set_cpu_isa(request.param)
    if used != request.param:
        native.set_cpu_isa(before)
        pytest.skip(f"this processor has {used}, not {request.param}")
    yield used
    native.set_cpu_isa(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN (or the largest integer), so that a read before a write shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # torch's default; needs deterministic algorithms
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of `ops.soft_value` so tiny that small problems have several blocks of rows and tiles, with a ragged
    rest of both."""
    module = importlib.import_module("fastqadapter.ops.soft_value")  # the package has the function under this name
    monkeypatch.setattr(module, "ROW_BLOCK", 3)
    monkeypatch.setattr(module, "VOCAB_TILE", 16)
