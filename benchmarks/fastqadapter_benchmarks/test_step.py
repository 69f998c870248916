"""A training step, forward and backward of one micro-batch of real pairs.

Round i gives every method the i-th micro-batch of the data. Nothing is timed before the losses agree: `separate` with
the published objective must give the published loss and gradient, an untrained `difference` head the loss log 2. That
takes a model in fp32, so models with random weights are not checked again: `demo`'s is, on the same device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fastqadapter_benchmarks.peers import steps
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import SETTINGS, Settings
from fastqadapter_benchmarks.workload import CONFIGS, Row, micro_batches, title_of


def in_turn(settings: Settings, model: str, label: str, batches: list[list[Row]]) -> Callable[[], Any]:
    """A call that takes the next micro-batch each time; the first, uncounted, is the warm-up."""
    step = steps.stepper(settings, model, label)
    calls = itertools.cycle([step(rows) for rows in batches])
    first = next(calls)
    waiting = itertools.chain([first, first], calls)
    return lambda: next(waiting)()


def after_warm_up(settings: Settings, model: str, label: str, rows: list[Row]) -> Callable[[], Any]:
    """A call that runs a step on next to nothing the first time, and on the micro-batch from then on."""
    step = steps.stepper(settings, model, label)
    tiny, whole = step([{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}]), step(rows)
    waiting = itertools.chain([tiny], itertools.repeat(whole))
    return lambda: next(waiting)()


def competitors(
    settings: Settings, model: str, labels: Sequence[str], batches: list[list[Row]]
) -> Iterator[Competitor]:
    for label in labels:
        arguments = settings, model, label
        yield Competitor(
            label,
            functools.partial(in_turn, *arguments, batches),
            "another loss" if label == steps.DPO else "",
            functools.partial(after_warm_up, *arguments, batches[0]),
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash[SETTINGS]
    metafunc.parametrize("model", settings.models)


def test_training_step(benchmark: Any, settings: Settings, model: str) -> None:
    size = settings.pairs_in_step
    batches = micro_batches(settings, size, model)
    if model not in CONFIGS:
        assert not [*steps.disagreements(settings, model, batches[0][: 2 if settings.full else 1], torch.bfloat16)]
    padded = sum(steps.pad_rows(rows, 0).input_ids.numel() for rows in batches) // len(batches)
    title = f"{title_of(model)}, bf16, micro-batches of {size} pairs, {padded} padded tokens"
    race = Race(benchmark, settings, "step", title, pairs=size, tokens=padded)
    labels = (*steps.METHODS, *(steps.MORE_METHODS if settings.full else ()), steps.DPO)
    race.enter(competitors(settings, model, labels, batches))
    race.run(memory=True)
