"""A training step, forward and backward of one micro-batch of real pairs.

Round i gives every method the i-th micro-batch of the data. `peers/steps.py` has the methods, and checks losses and
gradients before any time is taken. That takes a model in fp32, so for one of billions of random weights it is the
demo's that is checked, on the same device.
"""

from __future__ import annotations

from typing import Any

import pytest

import fastqadapter as fqa
from fastqadapter_benchmarks.peers import steps
from fastqadapter_benchmarks.race import Race
from fastqadapter_benchmarks.settings import SETTINGS, Settings
from fastqadapter_benchmarks.workload import CONFIGS, micro_batches, title_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash[SETTINGS]
    metafunc.parametrize("model", settings.models, ids=map(title_of, settings.models))


def test_training_step(benchmark: Any, settings: Settings, model: str) -> None:
    steps.check(settings, "demo" if model in CONFIGS else model, 2 if settings.full else 1)
    size = settings.pairs_in_step
    batches = micro_batches(settings, size, model)
    padded = sum(steps.pad_rows(rows, 0).input_ids.numel() for rows in batches) // len(batches)
    collate = fqa.PreferenceCollator(None, None)
    packed = sum(len(collate(rows).input_ids) for rows in batches) // len(batches)
    title = f"{title_of(model)}, bf16, micro-batches of {size} pairs, {padded} padded tokens, {packed} packed"
    race = Race(benchmark, settings, "step", title, pairs=size, tokens=padded)
    labels = (*steps.METHODS, *(steps.MORE_METHODS if settings.full else ()), steps.DPO)
    race.enter(steps.competitors(settings, model, labels, batches))
    race.run(memory=True)
