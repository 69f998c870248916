"""The loss from hidden states: the problem, the competitors, and the check that comes before any time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastqadapter.testing import assert_close_to_truth
from fastqadapter_benchmarks.peers import lm_head
from fastqadapter_benchmarks.peers.lm_head import Problem
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import HEADS, Settings
from fastqadapter_benchmarks.workload import batch_of_states, real_hidden_states

FLOOR, OTHER_LOSS, APPROXIMATE = "the GEMMs it needs, alone", "another loss", "approximate"
ALLOWED, ALLOWED_IN_16_BITS = 0.01, 0.1  # of the norm of the gradient
CHECKED_PAIRS = 2

Build = Callable[[Problem], Callable[[], Any]]


def competitors(settings: Settings, pairs: int) -> dict[str, tuple[Build, str]]:
    """Label -> how the call is made of a problem, and a note. The first is ours.

    On a CPU with the sizes of chunks that are fastest here: their own choices took 1.7 (TRL) and 2.1 times (torch) as
    long. On a GPU with their own.
    """
    backend, on_gpu = settings.our_backend, settings.on_gpu
    table: dict[str, tuple[Build, str]] = {
        f"fastqadapter ({backend})": (functools.partial(lm_head.backend, name=backend), ""),
        "eager": (functools.partial(lm_head.backend, name="eager"), ""),
        "published": (lm_head.published, ""),
        "torch.compile of eager": (functools.partial(lm_head.published, compiled=True), ""),
        "torch linear_cross_entropy, twice": (
            functools.partial(lm_head.torch_twice, most_rows=None if on_gpu else 512),
            "" if on_gpu else "at most 512 rows at once",
        ),
        "TRL chunked log-probs, twice": (
            functools.partial(lm_head.trl_twice, vocab_chunk=32768 if on_gpu else 4096),
            "" if on_gpu else "4096 tokens at once",
        ),
        "Liger linear cross-entropy, twice": (lm_head.liger_twice, ""),
        "cut-cross-entropy, twice": (lm_head.cce_twice, "unfiltered" if on_gpu else "its torch.compile path"),
        "cut-cross-entropy, filtered, twice": (functools.partial(lm_head.cce_twice, filter_eps="high"), APPROXIMATE),
        "Liger chunked DPO": (functools.partial(lm_head.liger_dpo, pairs_at_once=pairs), OTHER_LOSS),
        FLOOR: (lm_head.bare_products, "floor"),
    }  # fmt: skip
    if on_gpu:
        table["torch linear_cross_entropy, twice, tuned"] = (
            functools.partial(lm_head.torch_twice, most_rows=1024),
            "at most 1024 rows at once",
        )
    if backend != "torch":
        table["fastqadapter, torch backend"] = functools.partial(lm_head.backend, name="torch"), ""
    if settings.full:
        table["Liger chunked DPO, a pair at once"] = lm_head.liger_dpo, OTHER_LOSS
    return table


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, device: str) -> Problem:
    """The same tensors for all competitors of a process."""
    return Problem.load(path, device)


def from_file(build: Build, path: Path, device: str, gradient: bool = True) -> Callable[[], Any]:
    return build(dataclasses.replace(_loaded(path, device), gradient=gradient))


def make_problem(settings: Settings, head: str, states: int, dtype: torch.dtype) -> Problem:
    batch = batch_of_states(settings, states)
    if head == settings.model:
        hidden_q, hidden_b, own = real_hidden_states(settings, batch)
        return Problem(hidden_q, hidden_b, own.weight.detach(), batch, own.softcap).to(dtype, settings.device)
    return Problem.random(batch, HEADS[head].size, HEADS[head].vocab, HEADS[head].softcap).to(dtype, settings.device)


def check(problem: Problem, table: dict[str, tuple[Build, str]], race: Race) -> None:
    """Ours agrees with eager in float64; who computes something else is not timed.

    The loss is a mean over pairs, so the first rows of the whole gradient are the gradient of the first pairs alone,
    times their share of all pairs. Without gradient, the values are compared.
    """
    few = problem.first(CHECKED_PAIRS)
    share = len(few.batch) / len(problem.batch) if problem.gradient else 1.0
    what = "gradient" if problem.gradient else "values"
    device = race.settings.device
    in_float32 = few.to(torch.float32, device)
    truth = lm_head.backend(few.to(torch.float64, device), "eager")().found
    eager = lm_head.backend(few, "eager")().found
    for label in list(race.calls):
        build, note = table[label]
        if OTHER_LOSS in note or label == FLOOR:
            continue
        found = race.results[label].found[: len(truth)] / share
        race.facts["errors"][label] = off_by(found, truth)
        if label == race.ours:
            assert_close_to_truth(found, eager, truth, name=what, dtype=problem.weight.dtype)
        elif note != APPROXIMATE:
            error, allowed = _error_in_float32(build, in_float32, truth)
            if math.isnan(error):
                error, allowed = off_by(found, truth), ALLOWED_IN_16_BITS
            if not error < allowed:
                race.withdraw(label, f"computes something else: {what} off by {error:.1%}")


def _error_in_float32(build: Build, few: Problem, truth: Tensor) -> tuple[float, float]:
    """Relative error, and the bar; NaN of a peer on CUDA that knows the 16-bit dtypes alone (cut-cross-entropy)."""
    try:
        return off_by(build(few)().found, truth), ALLOWED
    except Exception:
        if not few.weight.is_cuda:
            raise
        return math.nan, ALLOWED


def off_by(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def run_checked(race: Race, problem: Problem, table: dict[str, tuple[Build, str]], folder: Path) -> None:
    """Let all of the table enter, each able to run in a process of its own, check them, and time them."""
    path = folder / "problem.safetensors"  # up to a gigabyte
    problem.save(path)
    where = path, race.settings.device, problem.gradient
    try:
        race.enter(
            Competitor(label, functools.partial(from_file, build, *where), note)
            for label, (build, note) in table.items()
        )
        check(problem, table, race)
        race.run(memory=True)
    finally:
        path.unlink()
