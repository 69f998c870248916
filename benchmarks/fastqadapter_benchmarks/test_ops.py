"""Single operators: soft values without gradient, and what a customised token costs once there are logits.

The floor is the traffic or the products that nobody can do without. Nothing is timed before ours agrees with eager in
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastqadapter import ops
from fastqadapter.testing import assert_close_to_truth
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import HEADS, SETTINGS, Settings

pytestmark = pytest.mark.full
ALPHAS = {"alpha_0": 0.9, "alpha_tilde": 0.7}
CHECKED_ROWS, LOGIT_ROWS = 16, 64
LOGIT_OPS = {"residual_log_probs": ops.residual_log_probs, "residual_soft_value": ops.residual_soft_value}
Op = Callable[..., Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash[SETTINGS]
    metafunc.parametrize("head", [name for name in settings.heads if HEADS[name].softcap is None])
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", LOGIT_OPS)


def normal(settings: Settings, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(settings.device).manual_seed(0)
    return (scale * torch.randn(*shape, generator=generator, device=settings.device)).to(torch.bfloat16)


def calls(settings: Settings, op: Op, tensors: tuple[Tensor, ...]) -> list[Competitor]:
    """Ours, our fallback, eager, and eager as torch compiles it."""

    def run(backend: str) -> Callable[[], Callable[[], Tensor]]:
        return lambda: torch.no_grad()(lambda: op(*tensors, **ALPHAS, backend=backend))

    def compiled() -> Callable[[], Tensor]:
        return torch.no_grad()(torch.compile(lambda: op(*tensors, **ALPHAS, backend="eager"), dynamic=False))

    ours = settings.our_backend
    competitors = [Competitor(f"fastqadapter ({ours})", run(ours))]
    if ours != "torch":
        competitors.append(Competitor("fastqadapter, torch backend", run("torch")))
    return [*competitors, Competitor("eager", run("eager")), Competitor("torch.compile of eager", compiled)]


def check(settings: Settings, op: Op, tensors: tuple[Tensor, ...], rows: tuple[Tensor, ...]) -> None:
    """Ours against eager in float64 on a few rows; `tensors` is what is the same for all rows."""
    few = [each[:CHECKED_ROWS] for each in rows]

    def run(backend: str, dtype: torch.dtype) -> Tensor:
        return op(*(each.to(dtype) for each in (*few, *tensors)), **ALPHAS, backend=backend)

    ours = settings.our_backend
    three = run(ours, torch.bfloat16), run("eager", torch.bfloat16), run("eager", torch.float64)
    assert_close_to_truth(*three, name="op", dtype=torch.bfloat16)


def test_soft_value(benchmark: Any, settings: Settings, head: str) -> None:
    size, vocab, rows = HEADS[head].size, HEADS[head].vocab, settings.heads[head]
    weight, hidden_b = normal(settings, vocab, size, scale=2 / size**0.5), normal(settings, rows, size)
    hidden_q = 0.1 * hidden_b.flip(0)
    check(settings, ops.soft_value, (weight,), (hidden_q, hidden_b))
    scores = weight.new_empty(min(rows, 1024), vocab)

    def products() -> None:
        for hidden in (hidden_b, hidden_q):
            for chunk in hidden.split(1024):
                torch.mm(chunk, weight.T, out=scores[: len(chunk)])

    race = Race(
        benchmark, settings, "ops", f"soft_value, no gradient, {head} head, {rows} states", N=rows, V=vocab, D=size
    )
    race.enter(
        [*calls(settings, ops.soft_value, (hidden_q, hidden_b, weight)), floor("the 2 GEMMs it needs", products)]
    )
    race.run()


def test_logit_op(benchmark: Any, settings: Settings, head: str, name: str) -> None:
    vocab = HEADS[head].vocab
    q, b = normal(settings, LOGIT_ROWS, vocab), normal(settings, LOGIT_ROWS, vocab).flip(0)
    check(settings, LOGIT_OPS[name], (), (q, b))
    copies = q.clone(), b.clone()

    def copy() -> None:
        for to, each in zip(copies, (q, b), strict=True):
            to.copy_(each)

    race = Race(benchmark, settings, "ops", f"{name}, {LOGIT_ROWS} rows of {vocab} logits", N=LOGIT_ROWS, V=vocab)
    race.enter([*calls(settings, LOGIT_OPS[name], (q, b)), floor("a copy of both logits", copy)])
    race.run()


def floor(label: str, run: Callable[[], None]) -> Competitor:
    return Competitor(label, lambda: run, "floor")
