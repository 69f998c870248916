"""Autotuning of kernel configurations: opt-in, measured once, kept on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from backend_cases import move
from fastqadapter import ops
from soft_value_problem import problem

pytest.importorskip("triton", reason="Triton is not installed")
from fastqadapter_kernels.triton import autotune  # noqa: E402
from fastqadapter_kernels.triton.soft_value import RowConfig  # noqa: E402
from fastqadapter_kernels.triton.soft_value_lse import LseConfig  # noqa: E402

CPU = torch.device("cpu")
CANDIDATES = [RowConfig(1024, 4), RowConfig(2048, 8), RowConfig(4096, 8)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_chosen", {})
    return tmp_path / "fastqadapter" / "autotune.json"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks in the order in which they were measured; 2048 is the fastest, 4096 cannot run."""
    blocks: list[int] = []

    def measure(run: Any) -> float:
        return float(run())

    def run(config: RowConfig) -> float:
        blocks.append(config.block_v)
        if config.block_v == 4096:
            raise RuntimeError("out of resource: shared memory")
        return {1024: 2.0, 2048: 1.0}[config.block_v]

    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setattr(autotune, "run", run, raising=False)
    return blocks


def best(*problem: object) -> RowConfig:
    return autotune.best("an_op", CPU, problem, CANDIDATES, autotune.run)  # type: ignore[attr-defined]


def test_fastest_is_taken_and_measured_once(timed: list[int], cache: Path):
    assert best("bf16", 4096) == RowConfig(2048, 8)
    assert timed == [1024, 2048, 4096]
    assert best("bf16", 4096) == RowConfig(2048, 8)
    autotune._chosen.clear()  # as in another process
    assert best("bf16", 4096) == RowConfig(2048, 8)
    assert timed == [1024, 2048, 4096]
    best("bf16", 8192)  # another problem
    assert len(timed) == 6
    assert len(json.loads(cache.read_text())) == 2
    assert [path.name for path in cache.parent.iterdir()] == ["autotune.json"]


def test_configuration_that_no_candidate_has_is_measured_anew(timed: list[int], cache: Path):
    """A later version has other candidates."""
    best()
    content = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {**value, "num_warps": 32} for key, value in content.items()}))
    autotune._chosen.clear()
    assert best() == RowConfig(2048, 8)
    assert len(timed) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}'])
def test_damaged_cache_costs_a_measurement(content: str, timed: list[int], cache: Path):
    cache.parent.mkdir()
    cache.write_text(content)
    assert best() == RowConfig(2048, 8)
    autotune._chosen.clear()
    assert best() == RowConfig(2048, 8)
    assert len(timed) == 3


def test_cache_that_cannot_be_written_is_named(timed: list[int], cache: Path, caplog: pytest.LogCaptureFixture):
    cache.parent.write_text("a file where the folder should be")
    caplog.set_level(logging.WARNING)
    assert best() == best() == RowConfig(2048, 8)
    assert len(timed) == 3
    assert "cannot be written" in caplog.text and str(cache) in caplog.text


def test_only_under_the_environment_variable(monkeypatch: pytest.MonkeyPatch, cache: Path):
    """Both ops that tune: by their rule without it, and with what was measured with it."""
    seen: list[tuple[str, list[object]]] = []

    def choose(op: str, device: torch.device, problem: object, candidates: list[Any], run: Any) -> Any:
        seen.append((op, candidates))
        return candidates[-1]

    monkeypatch.setattr(autotune, "best", choose)
    case = problem(dtype=torch.float32)
    q, b, weight = move("triton", case.hidden_q, case.hidden_b, case.weight)

    def call() -> torch.Tensor:
        q_grad = q.clone().requires_grad_()
        with_gradient = ops.soft_value(q_grad, b, weight, **case.options, backend="triton")
        return torch.stack([with_gradient.detach(), ops.soft_value(q, b, weight, **case.options, backend="triton")])

    expected = call()
    assert not seen
    for value in ("", "0", "false"):
        monkeypatch.setenv("FASTQADAPTER_AUTOTUNE", value)
        call()
    assert not seen
    monkeypatch.setenv("FASTQADAPTER_AUTOTUNE", "1")
    torch.testing.assert_close(call(), expected)
    assert [op for op, _ in seen] == ["soft_value_and_gradient", "soft_value_lse"]
    assert all(len(set(candidates)) == len(candidates) > 1 for _, candidates in seen)


def test_alternatives_start_with_the_rule():
    for config in (RowConfig(2048, 8), LseConfig(64, 64, 16, 8, 3)):
        assert config.alternatives()[0] == config
