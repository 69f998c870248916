"""The loss of preference pairs from hidden states: soft values, rewards, loss and its gradient; with `--full` also the
values alone, as an evaluation needs them.

On the CPU the states are SmolLM2's own on real pairs, in bf16; larger heads (`--full`) get random ones, as do those of
Llama-3, Qwen2.5 and Gemma on a GPU. `loss_cases.py` has the competitors, and checks
their gradients before any time is taken. The errors in the table are those of the timed calls, in `dtype`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fastqadapter_benchmarks.loss_cases import competitors, make_problem, run_checked
from fastqadapter_benchmarks.race import Race
from fastqadapter_benchmarks.settings import SETTINGS, Settings, name_of
from fastqadapter_benchmarks.workload import title_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every head in bf16; the model's own also in fp32, and without gradient."""
    settings = metafunc.config.stash[SETTINGS]
    cases = [(head, torch.bfloat16, True) for head in settings.heads]
    if settings.full:
        cases += [(settings.model, torch.float32, True), (settings.model, torch.bfloat16, False)]
    names = [
        f"{title_of(head)}-{name_of(dtype)}-{'gradient' if gradient else 'values'}" for head, dtype, gradient in cases
    ]
    metafunc.parametrize(("head", "dtype", "gradient"), cases, ids=names)


def test_loss(
    benchmark: Any, settings: Settings, head: str, dtype: torch.dtype, gradient: bool, tmp_path: Path
) -> None:
    problem = dataclasses.replace(make_problem(settings, head, settings.heads[head], dtype), gradient=gradient)
    states, (vocab, size) = len(problem.hidden_q), problem.weight.shape
    table = competitors(settings, len(problem.batch))
    kind = "states" if head == settings.model else "random states"
    title = f"{title_of(head)} head, {name_of(dtype)}, {states} {kind} of {len(problem.batch)} pairs"
    title += "" if gradient else ", values alone"
    race = Race(benchmark, settings, "loss", title, N=states, D=size, V=vocab)
    if not gradient or dtype != torch.bfloat16:
        race.facts["variant"] = f"{name_of(dtype)}, {'gradient' if gradient else 'values'}"
    run_checked(race, problem, table, tmp_path)
