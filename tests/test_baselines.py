"""benchmarks/baselines: every method trains and is saved as an adapter that `fastqadapter eval` measures; the script
goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fastqadapter as fqa
from tiny import lora_parameters
from words import save_workplace

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "baselines"))
methods = pytest.importorskip("methods", reason="benchmarks/baselines is not here")
tables = pytest.importorskip("tables", reason="benchmarks/baselines is not here")
quality = pytest.importorskip("quality", reason="benchmarks/baselines is not here")
plans = pytest.importorskip("plans", reason="benchmarks/baselines is not here")
records = pytest.importorskip("records", reason="benchmarks/baselines is not here")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workplace(tmp_path_factory.mktemp("workplace"), rows=8)


def run_of(workplace: Path, method: str, **settings: Any) -> Any:
    return methods.Run(method, str(workplace / "base"), str(workplace / "pairs.jsonl"), **settings)


@pytest.mark.parametrize("method", methods.TRAINERS)
def test_every_method_trains(workplace: Path, tmp_path: Path, method: str) -> None:
    if method in ("dpo", "sft"):
        pytest.importorskip("trl", reason="TRL is not installed")
    found = methods.train(run_of(workplace, method), tmp_path)
    assert found["pairs"] == 8 and found["steps"] == 2 and found["seconds"] > 0 and "CPU" in found["device"]
    base = AutoModelForCausalLM.from_pretrained(workplace / "base")
    model = fqa.QAdapterModel.from_pretrained(base, tmp_path / methods.ADAPTER)
    moved = [weight for name, weight in lora_parameters(model).items() if "lora_B" in name]
    assert any(weight.abs().max() > 0 for weight in moved)
    assert {name.split(".")[-4] for name in lora_parameters(model)} == set(methods.TARGETS)


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_policy_of_a_baseline_is_the_plain_adapter(workplace: Path, tmp_path: Path, method: str) -> None:
    """Saved with alpha_0 = 0 and the head `logits`, a plain LoRA adapter's policy is its own softmax."""
    pytest.importorskip("trl", reason="TRL is not installed")
    methods.train(run_of(workplace, method, learning_rate=0.5), tmp_path)
    ids = torch.tensor([[7, 11, 20, 9]])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workplace / "base"), tmp_path / "adapter")
    ours = fqa.QAdapterModel.from_pretrained(str(workplace / "base"), tmp_path / "adapter")
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids).logits.log_softmax(dim=-1) for model in (plain, ours))
    torch.testing.assert_close(found, expected)


def test_ours_have_as_many_parameters_in_every_mode() -> None:
    runs = plans.compare("base", "pairs") | plans.ablation("base", "pairs")
    ours = [run for run in runs.values() if run.method == "q-adapter" and run.q_head == "difference"]
    assert sorted((run.kv_mode, run.seed) for run in ours) == sorted(itertools.product(plans.KV_MODES, plans.SEEDS))
    assert len({(run.rank, run.pairs, run.epochs, run.longest) for run in runs.values()}) == 1


def test_what_is_done_is_not_done_again(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    row = {"point": {}, "accuracy": {}, "margin": {}, "kl": 0.0, "perplexity": 3.0, "kept": 1.0, "capability": {}}

    def process(log: Path, *command: str) -> None:
        started.append(log.name)
        if log.name == "train.log":
            (log.parent / methods.TRAINED).write_text('{"seconds": 1.0}')
            return
        (log.parent / "eval").mkdir(exist_ok=True)
        if started.count("eval.log") == 1:
            raise RuntimeError("stopped half-way")
        results = {"adapters": {"run": {"rows": [row], "samples": {}}}}
        (log.parent / "eval" / "eval.json").write_text(json.dumps(results))

    monkeypatch.setattr(quality, "_process", process)
    run, kept = run_of(workplace, "sft"), tmp_path / "outcomes" / "words" / "sft.json"
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("pairs")
    with pytest.raises(RuntimeError, match="stopped half-way"):
        quality.outcome(tmp_path / "run", run, str(heldout), kept)
    assert not kept.exists()
    for _ in range(2):
        quality.outcome(tmp_path / "run", run, str(heldout), kept)
    assert started == ["train.log", "eval.log", "eval.log"]  # which goes on itself, from stage to stage
    with pytest.raises(ValueError, match="run with other settings or pairs"):
        quality.outcome(tmp_path / "run", dataclasses.replace(run, seed=1), str(heldout), kept)
    heldout.write_text("other pairs")
    with pytest.raises(ValueError, match="run with other settings or pairs"):
        quality.outcome(tmp_path / "run", run, str(heldout), kept)
    [(found, outcome)] = records.finished(kept.parent, ["dpo", "sft"])
    assert found == dataclasses.replace(run, model="base", train_pairs="words")  # no folder of this machine
    del row["capability"]
    assert outcome.pop("data") and outcome == {"seconds": 1.0, "rows": [row]}
    kept.unlink()
    with pytest.raises(ValueError, match="holds a run with other settings"):
        quality.outcome(tmp_path / "run", dataclasses.replace(run, seed=1), str(heldout), kept)


def test_a_file_that_is_no_outcome(tmp_path: Path) -> None:
    path = tmp_path / "hh" / "sft.json"
    path.parent.mkdir()
    path.write_text('{"run": {"method": "sft", "colour": "red"}}')
    with pytest.raises(ValueError, match=r"sft.json: no outcome of a run .*colour.*: delete it"):
        records.finished(path.parent, ["sft"])
    path.unlink()
    assert quality.finished(tmp_path) == {}  # a folder without a run


def test_a_process_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"train.log: exit code 3: .*\nno luck"):
        quality._process(tmp_path / "train.log", "-c", "import sys; print('line\\nno luck', flush=True); sys.exit(3)")


def outcome(accuracy: float, kl: float, *, rows: int = 1, device: str = "cpu") -> dict[str, Any]:
    def row(index: int) -> dict[str, Any]:
        interval = {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "count": 200}
        point = {"weight": 1 / (index + 1), "alpha_0": 1.0, "alpha_tilde": 1.0}
        rest = {"perplexity": 39.0, "kept": 0.95, "kl": kl / (index + 1) ** 2}
        return {"point": point, "accuracy": interval, "margin": interval, **rest}

    own = [row(index) for index in range(rows)]
    return {"seconds": 60.0, "peak_mib": 2048.0, "pairs": 480, "device": device, "rows": own}


def test_tables(workplace: Path) -> None:
    ours = records.named(run_of(workplace, "q-adapter"), "pairs")
    dpo = dataclasses.replace(ours, method="dpo", beta=0.1, learning_rate=2e-4)
    found = [
        (dpo, outcome(0.65, 0.02, device="a GPU")),
        (ours, outcome(0.66, 0.03, rows=3)),
        (dataclasses.replace(ours, seed=1), outcome(0.7, 0.05, rows=2)),
        (dataclasses.replace(ours, rank=32), {**outcome(0.61, 0.04), "note": "measured elsewhere"}),
    ]
    text = tables.section("pairs", found)
    lines = text.splitlines()
    assert any(line.startswith("| DPO (lr 0.0002, beta 0.1) | own |") and line.endswith("| a GPU |") for line in lines)
    [mean] = [line for line in lines if "| shared | difference | 2 |" in line]
    assert "| 0.680 [0.580, 0.780] | 0.660, 0.700 |" in mean and "| 0.0400 |" in mean
    # Weights that all seeds have that were measured at several; a note is marked and printed.
    assert any(line.endswith("| cpu * |") for line in lines) and "Rows with *: measured elsewhere." in text
    assert [line.split(" | ")[:3] for line in lines if line.startswith("| shared | ")] == [
        ["| shared", weight, "2"] for weight in ("1", "0.5")
    ]
    assert "The best DPO run has accuracy 0.650 at KL 0.0200." in text
    assert "Ours in `shared` mode at weight 0.5 has 0.680 at 0.0100, the mean of 2 seeds." in text
    assert "| rank 32 | 1 | 0.610" in text
    assert "base, 480 pairs of at most 256 tokens to train on, 200 held out." in text
    found[0] = (dpo, outcome(0.8, 0.02))
    assert "No weight of ours reaches that at half the KL." in tables.section("pairs", found)


def test_table_of_all_dials(workplace: Path) -> None:
    swept = outcome(0.66, 0.03, rows=3)
    swept["rows"][2]["point"] = {"weight": 1.0, "alpha_0": 0.5, "alpha_tilde": 1.0}
    text = tables.section("pairs", [(run_of(workplace, "q-adapter"), swept)])
    assert "| 1 | 0.5 | 1 | 0.660 [0.560, 0.760] | 0.66 | 0.0033 | 39.00 | 95.0% |" in text


def test_published_tables_are_those_of_the_outcomes(tmp_path: Path) -> None:
    data = quality.finished(ROOT / "benchmarks" / "baselines" / "outcomes")
    quality.write_report(data, tmp_path / "QUALITY.md")
    assert (tmp_path / "QUALITY.md").read_text() == (ROOT / "benchmarks" / "QUALITY.md").read_text()
    plots = (path.relative_to(tmp_path) for path in tmp_path.rglob("*.svg"))
    assert all((ROOT / "benchmarks" / plot).is_file() for plot in plots)
    for name, runs in data.items():
        done = [run for run, _ in runs]
        assert not [run for run in plans.compare("SmolLM2-135M-Instruct", name).values() if run not in done], name
    done = [run for run, _ in data["hh"]]
    assert not [run for run in plans.ablation("SmolLM2-135M-Instruct", "hh").values() if run not in done]
