"""How cost grows: one size at a time, doubled from point to point; the report fits an exponent to each line.

Only ours, the published computation and the floor or the base run here: that a peer is faster or slower at one size is
the business of the other suites.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import fastqadapter as fqa
from fastqadapter_benchmarks import test_decode as decode
from fastqadapter_benchmarks import test_loss as loss
from fastqadapter_benchmarks import test_step as step
from fastqadapter_benchmarks.peers.lm_head import Problem
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import SETTINGS, Settings
from fastqadapter_benchmarks.workload import Row, micro_batches

pytestmark = pytest.mark.full
LOSS_AXES = ("N", "D", "V")


def equal_pairs(states: int, pairs: int = 4) -> fqa.PackedPairs:
    """Pairs of two responses of one length, with `states` state rows together."""
    length = (states // pairs + 1) // 2
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt_ids": [1, 2, 3],
            "chosen_ids": torch.randint(1000, 8000, (length,), generator=generator).tolist(),
            "rejected_ids": torch.randint(1000, 8000, (length,), generator=generator).tolist(),
        }
        for _ in range(pairs)
    ]
    return fqa.PreferenceCollator(None, None)(rows)


def rows_of_length(length: int, pairs: int) -> list[Row]:
    """Tokenised pairs with an eighth of the length in the prompt, the rest in each response."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(1000, 40000, (count,), generator=generator).tolist()

    prompt = length // 8
    keys = {"prompt_ids": prompt, "chosen_ids": length - prompt, "rejected_ids": length - prompt}
    return [{key: ids(count) for key, count in keys.items()} for _ in range(pairs)]


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
    problem = Problem.random(equal_pairs(shape["N"]), shape["D"], shape["V"]).to(torch.bfloat16, settings.device)
    problem.save(tmp_path / "problem.safetensors")
    race = make_race(benchmark, settings, axis, size, "loss and gradient", **(shape | {"N": len(problem.hidden_q)}))
    table = loss.competitors(settings, len(problem.batch))
    ours = next(iter(table))
    table = {label: table[label] for label in (ours, "published", loss.FLOOR)}
    race.enter(
        Competitor(label, functools.partial(loss.from_file, build, tmp_path / "problem.safetensors", settings.device))
        for label, (build, _) in table.items()
    )
    loss.check(problem, table, race)
    race.run(memory=True)


def test_step(benchmark: Any, settings: Settings, axis: str, size: int) -> None:
    """Not checked again here: `test_step.py` is."""
    same = [rows_of_length(size, pairs=2)] * settings.rounds
    batches = micro_batches(settings, size) if axis == "pairs" else same
    race = make_race(benchmark, settings, axis, size, "training step", **{axis: size})
    race.enter(step.competitors(settings, "demo", ("fastqadapter, shared", "published"), batches))
    race.run(memory=True)


def test_decode(benchmark: Any, settings: Settings, axis: str, size: int) -> None:
    race = make_race(benchmark, settings, axis, size, "token behind a prompt", prompt=size)
    labels = ("fastqadapter, shared", decode.BASE, decode.TWO_PASSES)
    entrants = decode.competitors(settings, "demo", decode.prompt(settings, 1, size), settings.new_tokens)
    decode.compete(race, [each for each in entrants if each.label in labels])
