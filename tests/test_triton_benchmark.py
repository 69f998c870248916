"""benchmarks/triton_kernels.py without a GPU: everything but the clock."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backend_cases import device_of
from benchmarks import triton_kernels

ROOT = Path(__file__).parents[1]


@pytest.fixture
def case() -> triton_kernels.Case:
    return triton_kernels.Case.make(6, 24, 70, torch.bfloat16, device_of("triton"))


def test_every_competitor_is_run_in_turn(case: triton_kernels.Case):
    clock = itertools.count(1)

    def measure(run: object) -> float:
        run()  # type: ignore[operator]
        return float(next(clock))

    text = triton_kernels.report(case, measure)
    assert [line.split("  ")[1] for line in text] == [
        "soft_value, training",
        "soft_value, evaluation",
        "residual_soft_value, 6 rows",
        "residual_log_probs, 6 rows",
    ]
    # Three competitors in three rounds: the first ticks at 1, 4, 7.
    assert "3 bare GEMMs 4.000 ms (1.00x), triton 5.000 ms (1.25x), torch 6.000 ms (1.50x)" in text[0]


@pytest.mark.parametrize(("count", "label"), [(3, "training"), (2, "evaluation")])
def test_bare_products_are_as_many_as_they_say(count: int, label: str, case: triton_kernels.Case):
    with FlopCounterMode(display=False) as counter:
        triton_kernels.bare_products(case, count)()
    assert counter.get_total_flops() == count * 2 * 6 * 24 * 70


def test_nothing_is_measured_when_the_kernels_are_wrong(case: triton_kernels.Case, monkeypatch: pytest.MonkeyPatch):
    from fastqadapter_kernels.triton import launchers

    right = launchers.soft_value_and_gradient

    def wrong(*args: object, **options: object) -> object:
        value, lse, expected = right(*args, **options)  # type: ignore[arg-type]
        return value, lse, expected * 1.1

    monkeypatch.setattr(launchers, "soft_value_and_gradient", wrong)
    with pytest.raises(AssertionError, match="soft_value"):
        triton_kernels.report(case, lambda run: pytest.fail("measured"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_machine_without_a_gpu_is_told_so():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "triton_kernels.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "torch finds none" in done.stderr and "Traceback" not in done.stderr
