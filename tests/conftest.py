"""Fixtures that several test files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    # The tensors of the tests are tiny: more threads only wait for each other (60 s instead of 8 s on busy cores).
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN (or the largest integer), so that a read before a write shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # torch's default; needs deterministic algorithms
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
