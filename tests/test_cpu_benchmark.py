"""The benchmarks of the native CPU kernels: the competitors compute what they claim, and nothing is timed on red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastqadapter as fqa
from benchmarks import head_share
from benchmarks.peers import lm_head
from fastqadapter_kernels import cpu, native
from tiny import PAIRS, make_twins, packed

needs_library = pytest.mark.skipif(native.native_library() is None, reason="no native library: no C++ compiler found")
SHAPE = (16, 6, 70)


@pytest.mark.parametrize(
    ("call", "package"),
    [
        (lm_head.published, "torch"),
        (lambda problem: lm_head.trl_twice(problem, 32), "trl"),
        (lambda problem: lm_head.torch_twice(problem, 5), "torch"),
    ],
    ids=["published", "TRL", "torch"],
)
def test_competitor_computes_the_same(call: Callable[[lm_head.Problem], lm_head.Call], package: str):
    pytest.importorskip(package, reason=f"{package} is not installed (extra bench)")
    if call is not lm_head.published and package == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked linear_cross_entropy")
    problem = lm_head.Problem.make(*SHAPE, torch.float32)
    for found, expected in zip(call(problem)(), lm_head.backend(problem, "eager")(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bare_products_are_three():
    with FlopCounterMode(display=False) as counter:
        lm_head.bare_products(lm_head.Problem.make(*SHAPE, torch.float32))()
    assert counter.get_total_flops() == 3 * 2 * 16 * 6 * 70


@needs_library
def test_no_time_is_taken_of_wrong_kernels(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (extra bench)")
    pytest.importorskip("trl", reason="trl is not installed (extra bench)")
    from benchmarks import test_cpu_kernels

    problem = lm_head.Problem.make(*SHAPE, torch.bfloat16)
    test_cpu_kernels.check(problem)
    right = cpu.soft_value_and_gradient

    def wrong(*args: Any) -> tuple[torch.Tensor, ...]:
        value, lse, expected = right(*args)
        return value, lse, 1.1 * expected

    monkeypatch.setattr(cpu, "soft_value_and_gradient", wrong)
    with pytest.raises(AssertionError, match="gradient"):
        test_cpu_kernels.check(problem)


@pytest.fixture
def model() -> fqa.QAdapterModel:
    return make_twins("llama", "shared").model.train()


@needs_library
def test_head_share_times_the_loss_of_the_step(model: fqa.QAdapterModel):
    batch = packed(PAIRS, model)
    torch.testing.assert_close(head_share.head_of(model, batch)(), model(batch).loss)
    times = head_share.measure(model, [batch, batch])
    assert {key: len(found) for key, found in times.items()} == {
        (what, backend): 2 for what in ("step", "head") for backend in head_share.BACKENDS
    }


@needs_library
def test_head_share_refuses_backends_that_differ(model: fqa.QAdapterModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "taken_value", lambda *args: torch.ones(len(args[2])))
    with pytest.raises(SystemExit, match="RED: micro-batch 0: the losses differ by"):
        head_share.measure(model, [packed(PAIRS, model)])
