"""The competitors of the loss and step benchmarks compute what they claim, and nothing is timed on red."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastqadapter as fqa
from fastqadapter_benchmarks import loss_cases
from fastqadapter_benchmarks.memory import extra_of_a_child
from fastqadapter_benchmarks.peers import lm_head, steps
from fastqadapter_benchmarks.peers.lm_head import Problem
from fastqadapter_benchmarks.race import Competitor, Race, Unavailable
from fastqadapter_benchmarks.settings import Settings
from fastqadapter_benchmarks.workload import pairs
from words import save_workplace

SIZE, VOCAB = 6, 70
Peer = Callable[[Problem], Callable[[], Any]]
PEERS: dict[str, tuple[Peer, str]] = {
    "published": (lm_head.published, "torch"),
    "torch": (functools.partial(lm_head.torch_twice, most_rows=5), "torch"),
    "TRL": (functools.partial(lm_head.trl_twice, vocab_chunk=32), "trl"),
    "cut-cross-entropy": (lm_head.cce_twice, "cut_cross_entropy"),
}


def problem(softcap: float | None = None, gradient: bool = True) -> Problem:
    triples = [([1, 2, 3], [4, 5, 6, 7], [8, 9]), ([1, 2], [3], [4, 5, 6]), ([9], [8, 7], [6, 5])]
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = fqa.PreferenceCollator(None, None)([dict(zip(keys, triple, strict=True)) for triple in triples])
    return dataclasses.replace(Problem.random(batch, SIZE, VOCAB, softcap), gradient=gradient)


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "values"])
@pytest.mark.parametrize("name", PEERS)
def test_peer_computes_the_same(name: str, gradient: bool) -> None:
    build, package = PEERS[name]
    pytest.importorskip(package, reason=f"{package} is not installed (extra bench)")
    if name == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked linear_cross_entropy")
    case = problem(gradient=gradient)
    for found, expected in zip(build(case)()[:2], lm_head.backend(case, "eager")()[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "values"])
def test_published_way_knows_the_soft_cap(gradient: bool) -> None:
    case = problem(softcap=2.0, gradient=gradient)
    for found, expected in zip(lm_head.published(case)()[:2], lm_head.backend(case, "eager")()[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(Unavailable, match="soft-cap"):
        lm_head.torch_twice(case)


@pytest.mark.parametrize(("gradient", "count"), [(True, 3), (False, 2)])
def test_floor_is_as_many_products_as_it_says(gradient: bool, count: int) -> None:
    case = problem(gradient=gradient)
    with FlopCounterMode(display=False) as counter:
        lm_head.bare_products(case)()
    assert counter.get_total_flops() == count * 2 * len(case.hidden_q) * SIZE * VOCAB


def test_first_pairs_have_their_share_of_the_gradient() -> None:
    """What the check of the whole, timed gradient rests on."""
    whole, few = problem(), problem().first(2)
    gradient = lm_head.backend(whole, "eager")().found
    expected = lm_head.backend(few, "eager")().found
    torch.testing.assert_close(gradient[: len(expected)] * len(whole.batch) / len(few.batch), expected)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_problem_survives_its_file(tmp_path: Path, softcap: float | None) -> None:
    case = problem(softcap)
    case.save(tmp_path / "problem.safetensors")
    back = Problem.load(tmp_path / "problem.safetensors")
    assert back.batch.lengths == case.batch.lengths and back.softcap == softcap
    for found, expected in zip(lm_head.backend(back, "eager")()[:2], lm_head.backend(case, "eager")()[:2], strict=True):
        assert torch.equal(found, expected)


class Rounds:
    """pytest-benchmark's fixture without its clock."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable[[], Any], setup: Callable[[], Any], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()


def entered(case: Problem, table: dict[str, tuple[Peer, str]]) -> Race:
    race = Race(Rounds(), Settings(), "loss", "tiny")
    race.enter(Competitor(label, lambda build=build: build(case), note) for label, (build, note) in table.items())
    return race


def wrong(case: Problem) -> Callable[[], Any]:
    """One and a tenth of the gradient."""
    result = lm_head.published(case)()
    return lambda: result._replace(found=1.1 * result.found)


def test_who_computes_something_else_is_not_timed() -> None:
    ours = functools.partial(lm_head.backend, name="torch")
    table = {"fastqadapter": (ours, ""), "wrong": (wrong, ""), "other": (wrong, loss_cases.OTHER_LOSS)}
    case = problem()
    race = entered(case, table)
    loss_cases.check(case, table, race)
    assert list(race.calls) == ["fastqadapter", "other"]
    assert "computes something else: gradient off by 10.0%" in race.absent["wrong"]
    table["fastqadapter"] = wrong, ""
    with pytest.raises(AssertionError, match="gradient"):
        loss_cases.check(case, table, entered(case, table))


def test_race_runs_all_in_turn_and_lists_who_cannot() -> None:
    order: list[str] = []

    def runs(label: str) -> Callable[[], Callable[[], None]]:
        return lambda: lambda: order.append(label)

    def missing() -> Callable[[], None]:
        raise ModuleNotFoundError("No module named 'peer'", name="peer")

    def broken() -> None:
        raise RuntimeError("no kernel\nfor this device")

    race = Race(Rounds(), Settings(rounds=5, peers=("b", "miss", "brok")), "loss", "tiny", N=3)
    race.enter(
        [
            Competitor("fastqadapter", runs("ours"), "fast"),
            Competitor("b", runs("b")),
            Competitor("c, not asked for", runs("c")),
            Competitor("missing", missing),
            Competitor("broken", lambda: broken),
        ]
    )
    facts = race.run()
    assert order == ["ours", "b", *["b", "ours"] * 5]
    assert {label: len(times) for label, times in facts["seconds"]["time"].items()} == {"fastqadapter": 5, "b": 5}
    assert facts["absent"] == {
        "missing": 'peer is not installed: pip install "fastqadapter[bench]"',
        "broken": "fails here: RuntimeError: no kernel for this device",
    }
    assert facts["ours"] == "fastqadapter" and facts["notes"] == {"fastqadapter": "fast"} and facts["shape"] == {"N": 3}
    assert race.benchmark.extra_info["machine"]["threads"] == 2
    json.dumps(race.benchmark.extra_info)


def test_ours_must_run() -> None:
    def broken() -> Callable[[], None]:
        raise RuntimeError("our own fault")

    with pytest.raises(RuntimeError, match="our own fault"):
        Race(Rounds(), Settings(), "loss", "tiny").enter([Competitor("fastqadapter, shared", broken)])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A tiny model and pairs in its words, as a user's lie on disk."""
    folder = save_workplace(tmp_path_factory.mktemp("bench"), 12)
    return Settings(model=str(folder / "base"), data=str(folder / "pairs.jsonl"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_agree_and_a_wrong_one_is_found(
    workplace: Settings, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pairs(workplace, 3)
    assert [*steps.disagreements(workplace, workplace.model, rows, dtype)] == []
    right = steps.two_pass.two_pass_loss
    monkeypatch.setattr(steps.two_pass, "two_pass_loss", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    found = [*steps.disagreements(workplace, workplace.model, rows, dtype)]
    assert any("separate is not the published computation" in each for each in found)


def test_a_wrong_backend_is_found(workplace: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager backend's loss is another: all that are compared with it differ."""
    right = steps.Method.loss_of

    def wrong(self: steps.Method, *args: Any) -> Any:
        loss_of = right(self, *args)
        eager = steps.os.environ.get(steps.ENVIRONMENT_VARIABLE) == "eager"
        return lambda: loss_of() * (1.001 if eager else 1.0)

    monkeypatch.setattr(steps.Method, "loss_of", wrong)
    found = [*steps.disagreements(workplace, workplace.model, pairs(workplace, 3), torch.float32)]
    assert sum("off the eager backend" in each for each in found) == 3


def test_dpo_trainer_takes_the_same_rows(workplace: Settings) -> None:
    pytest.importorskip("trl", reason="trl is not installed (extra bench)")
    step = steps.stepper(workplace, workplace.model, steps.DPO)
    loss = step(pairs(workplace, 3))()
    assert loss.item() == pytest.approx(0.6931, abs=1e-2)  # log 2: policy and reference are the same


def test_too_few_pairs_are_named(workplace: Settings) -> None:
    with pytest.raises(ValueError, match="has 12 pairs of at most 128 tokens; this suite needs 99"):
        pairs(workplace, 99)


def _takes(mib: int) -> Callable[[], Any]:
    return lambda: torch.ones(mib, 2**20, dtype=torch.uint8)


def test_memory_of_a_call_in_a_child() -> None:
    peak = extra_of_a_child(functools.partial(_takes, 200), threads=1)
    if isinstance(peak, str):
        pytest.skip(peak)
    assert 190 < peak < 230
