"""How cost grows: one size at a time, doubled from point to point; the report fits an exponent to each line.

Only ours, the published computation and the floor or the base run here: that a peer is faster or slower at one size is
the business of the other suites.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastqadapter as fqa
from fastqadapter_benchmarks import decoding, loss_cases
from fastqadapter_benchmarks.peers import steps
from fastqadapter_benchmarks.peers.lm_head import Problem
from fastqadapter_benchmarks.race import Race
from fastqadapter_benchmarks.settings import SETTINGS, Settings
from fastqadapter_benchmarks.workload import Row, micro_batches, random_ids, vocab_size

pytestmark = pytest.mark.full
LOSS_AXES = ("N", "D", "V")


def equal_rows(vocab: int, prompt: int, response: int, pairs: int) -> list[Row]:
    """Tokenised pairs of one length each."""
    ids = random_ids(vocab, pairs, prompt + 2 * response).tolist()
    ends = prompt, prompt + response
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(keys, (row[: ends[0]], row[ends[0] : ends[1]], row[ends[1] :]), strict=True)) for row in ids]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash[SETTINGS]
    axes = {
        "test_loss": [(axis, size) for axis in LOSS_AXES for size in settings.growth[axis]],
        "test_step": [(axis, size) for axis in ("context", "pairs") for size in settings.growth[axis]],
        "test_decode": [("decoded context", size) for size in settings.growth["decoded context"]],
    }[metafunc.function.__name__]
    metafunc.parametrize(("axis", "size"), axes, ids=[f"{axis}-{size}".replace(" ", "-") for axis, size in axes])


def make_race(benchmark: Any, settings: Settings, axis: str, size: int, unit: str, **shape: float) -> Race:
    race = Race(benchmark, settings, "growth", unit, **shape)
    race.facts |= {"axis": axis, "at": size}
    return race


def test_loss(benchmark: Any, settings: Settings, axis: str, size: int, tmp_path: Path) -> None:
    shape = settings.growth_shape | {axis: size}
    rows = equal_rows(shape["V"], prompt=3, response=(shape["N"] // 4 + 1) // 2, pairs=4)
    batch = fqa.PreferenceCollator(None, None)(rows)
    problem = Problem.random(batch, shape["D"], shape["V"]).to(torch.bfloat16, settings.device)
    race = make_race(benchmark, settings, axis, size, "loss and gradient", **(shape | {"N": len(problem.hidden_q)}))
    table = loss_cases.competitors(settings, len(batch))
    chosen = next(iter(table)), "published", loss_cases.FLOOR
    loss_cases.run_checked(race, problem, {label: table[label] for label in chosen}, tmp_path)


def test_step(benchmark: Any, settings: Settings, axis: str, size: int) -> None:
    steps.check(settings, settings.model)
    prompt = size // 8  # the rest of a branch is its response
    same = [equal_rows(vocab_size(settings.model), prompt, size - prompt, pairs=2)] * settings.rounds
    batches = micro_batches(settings, size) if axis == "pairs" else same
    race = make_race(benchmark, settings, axis, size, "training step", **{axis: size})
    race.enter(steps.competitors(settings, settings.model, ("fastqadapter, shared", "published"), batches))
    race.run(memory=True)


def test_decode(benchmark: Any, settings: Settings, axis: str, size: int) -> None:
    decoding.check(settings, settings.model)
    race = make_race(benchmark, settings, axis, size, "token behind a prompt", prompt=size)
    labels = ("fastqadapter, shared", decoding.BASE, decoding.TWO_PASSES)
    ids = decoding.prompt(settings, settings.model, 1, size)
    entrants = decoding.competitors(settings, settings.model, ids, settings.new_tokens)
    decoding.compete(race, [each for each in entrants if each.label in labels])
