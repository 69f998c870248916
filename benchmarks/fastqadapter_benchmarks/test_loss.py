"""The loss of preference pairs from hidden states: soft values, rewards, loss and its gradient; with `--full` also the
values alone, as an evaluation needs them.

On the CPU the states are SmolLM2's own on real pairs, in bf16; larger heads (`--full`) get random ones, as do those of
Llama-3, Qwen2.5 and Gemma on a GPU. Nothing is timed before our gradient agrees with eager in float64; a peer whose
gradient is off by 1% in float32 computes something else and is not timed. The errors in the table are those in `dtype`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastqadapter.testing import assert_close_to_truth
from fastqadapter_benchmarks.peers import lm_head
from fastqadapter_benchmarks.peers.lm_head import Problem
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import HEADS, SETTINGS, Settings, name_of
from fastqadapter_benchmarks.workload import batch_of_states, real_hidden_states, title_of

FLOOR, OTHER_LOSS, APPROXIMATE = "the GEMMs it needs, alone", "another loss", "approximate"
ALLOWED = 0.01  # of the norm of the gradient, in float32
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
        "torch.compile of the published": (functools.partial(lm_head.published, compiled=True), ""),
        "torch linear_cross_entropy, twice": (
            functools.partial(lm_head.torch_twice, row_chunk=None if on_gpu else 512),
            "" if on_gpu else "512 rows at once",
        ),
        "TRL chunked log-probs, twice": (
            functools.partial(lm_head.trl_twice, vocab_chunk=32768 if on_gpu else 4096),
            "" if on_gpu else "4096 tokens at once",
        ),
        "Liger linear cross-entropy, twice": (lm_head.liger_twice, ""),
        "cut-cross-entropy, twice": (lm_head.cce_twice, "exact" if on_gpu else "its torch.compile path"),
        "cut-cross-entropy, filtered, twice": (functools.partial(lm_head.cce_twice, filter_eps="high"), APPROXIMATE),
        "Liger chunked DPO": (functools.partial(lm_head.liger_dpo, pairs_at_once=pairs), OTHER_LOSS),
        FLOOR: (lm_head.bare_products, "floor"),
    }  # fmt: skip
    if backend != "torch":
        table["fastqadapter, torch backend"] = functools.partial(lm_head.backend, name="torch"), ""
    if settings.full:
        table["Liger chunked DPO, a pair at once"] = lm_head.liger_dpo, OTHER_LOSS
    return table


def from_file(build: Build, path: Path, device: str, gradient: bool = True) -> Callable[[], Any]:
    return build(Problem.load(path, device, gradient))


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
    _, truth = lm_head.backend(few.to(torch.float64, device), "eager")()
    _, eager = lm_head.backend(few, "eager")()
    for label in list(race.calls):
        build, note = table[label]
        if OTHER_LOSS in note or label == FLOOR:
            continue
        _, whole = race.results[label]
        found = whole[: len(truth)] / share
        race.facts["errors"][label] = off_by(found, truth)
        if label == race.ours:
            assert_close_to_truth(found, eager, truth, name=what, dtype=problem.weight.dtype)
        elif note != APPROXIMATE:
            _, found = build(few.to(torch.float32, device))()
            error = off_by(found, truth)
            if not error < ALLOWED:
                race.withdraw(label, f"computes something else: {what} off by {error:.1%} in float32")


def off_by(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings: Settings = metafunc.config.stash[SETTINGS]
    metafunc.parametrize("head", settings.heads)
    cases = [(dtype, True) for dtype in settings.dtypes]
    cases += [(torch.bfloat16, False)] if settings.full else []
    names = [f"{name_of(dtype)}-{'gradient' if gradient else 'values'}" for dtype, gradient in cases]
    metafunc.parametrize(("dtype", "gradient"), cases, ids=names)


def test_loss(
    benchmark: Any, settings: Settings, head: str, dtype: torch.dtype, gradient: bool, tmp_path: Path
) -> None:
    problem = dataclasses.replace(make_problem(settings, head, settings.heads[head], dtype), gradient=gradient)
    problem.save(tmp_path / "problem.safetensors")
    states, (vocab, size) = len(problem.hidden_q), problem.weight.shape
    table = competitors(settings, len(problem.batch))
    title = f"{title_of(head)} head, {name_of(dtype)}, {states} states of {len(problem.batch)} pairs"
    title += "" if gradient else ", values alone"
    race = Race(benchmark, settings, "loss", title, N=states, D=size, V=vocab)
    race.enter(
        Competitor(
            label,
            functools.partial(from_file, build, tmp_path / "problem.safetensors", settings.device, gradient),
            note,
        )
        for label, (build, note) in table.items()
    )
    check(problem, table, race)
    race.run(memory=True)
