"""Operators on logits: what a customised token costs once there are logits of both streams.

The floor is the traffic that nobody can do without. Nothing is timed before ours agrees with eager in
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
from fastqadapter_benchmarks.loss_cases import ALLOWED, off_by
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import HEADS, SETTINGS, Settings
from fastqadapter_benchmarks.workload import title_of, vocab_size

pytestmark = pytest.mark.full
ALPHAS = {"alpha_0": 0.9, "alpha_tilde": 0.7}
CHECKED_ROWS, LOGIT_ROWS = 16, 64
LOGIT_OPS = {"residual_log_probs": ops.residual_log_probs, "residual_soft_value": ops.residual_soft_value}
Op = Callable[..., Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash[SETTINGS]
    metafunc.parametrize("head", settings.heads, ids=map(title_of, settings.heads))
    metafunc.parametrize("name", LOGIT_OPS)


def normal(settings: Settings, *shape: int) -> Tensor:
    generator = torch.Generator(settings.device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=settings.device).to(torch.bfloat16)


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


def check(settings: Settings, op: Op, tensors: tuple[Tensor, ...]) -> None:
    """Ours against eager in float64 on a few rows."""

    def run(backend: str, dtype: torch.dtype) -> Tensor:
        return op(*(each[:CHECKED_ROWS].to(dtype) for each in tensors), **ALPHAS, backend=backend)

    ours = settings.our_backend
    three = run(ours, torch.bfloat16), run("eager", torch.bfloat16), run("eager", torch.float64)
    assert_close_to_truth(*three, name="op", dtype=torch.bfloat16)


def test_logit_op(benchmark: Any, settings: Settings, head: str, name: str) -> None:
    vocab = HEADS[head].vocab if head in HEADS else vocab_size(head)
    q, b = normal(settings, LOGIT_ROWS, vocab), normal(settings, LOGIT_ROWS, vocab).flip(0)
    check(settings, LOGIT_OPS[name], (q, b))
    copies = q.clone(), b.clone()

    def copy() -> None:
        for to, each in zip(copies, (q, b), strict=True):
            to.copy_(each)

    race = Race(benchmark, settings, "ops", f"{name}, {LOGIT_ROWS} rows of {vocab} logits", N=LOGIT_ROWS, V=vocab)
    race.enter([*calls(settings, LOGIT_OPS[name], (q, b)), Competitor("a copy of both logits", lambda: copy, "floor")])
    truth = LOGIT_OPS[name](q.double(), b.double(), **ALPHAS, backend="eager")
    for label, found in list(race.results.items()):
        if found is not None and not (error := off_by(found, truth)) < ALLOWED:
            race.withdraw(label, f"computes something else: off by {error:.1%}")
    race.run()
