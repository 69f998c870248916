"""What a run of the benchmarks becomes: ratios, tables, plots, RESULTS.md, a comparison; and the command's mistakes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastqadapter import cli
from fastqadapter_benchmarks import compare, plots, report, results
from fastqadapter_benchmarks.results import Result, fitted_exponent, growth, read_results, results_of

MACHINE = {
    "device": "Abacus (wood)",
    "gpu": False,
    "threads": 2,
    "cores": 2,
    "kernels": "cpu (generic)",
    "versions": {"torch": "2.13.0"},
    "commit": "abc123",
}


def facts(suite: str = "loss", title: str = "a head", **changes: Any) -> dict[str, Any]:
    """What one case puts into pytest-benchmark's extra_info."""
    seconds = {
        "fastqadapter": [0.1, 0.1, 0.2, 0.1, 0.1],
        "peer": [0.3, 0.2, 0.8, 0.3, 0.3],
        "gemms": [0.05, 0.05, 0.05, 0.05, 0.05],
    }
    return {
        "suite": suite,
        "title": title,
        "ours": "fastqadapter",
        "seconds": {"time": seconds},
        "shape": {"N": 10, "V": 100},
        "extra_mib": {"fastqadapter": 1.0, "peer": 30.0},
        "errors": {"fastqadapter": 1e-3},
        "notes": {"gemms": "floor", "peer": "another loss"},
        "absent": {"other": "it needs a GPU"},
        "machine": MACHINE,
        **changes,
    }


def decoding(**changes: Any) -> dict[str, Any]:
    seconds = {
        "per_token": {"fastqadapter": [0.012] * 5, "base": [0.01] * 5},
        "first_token": {"fastqadapter": [0.2] * 5, "base": [0.1] * 5},
    }
    shape = {"batch": 4, "prompt": 8}
    return facts("decode", "a model", seconds=seconds, shape=shape, baseline="base", notes={}, extra_mib={}, errors={},
                 kv_bytes={"fastqadapter": 2**20, "base": 2**20}, absent={}) | changes  # fmt: skip


def sweep(at: int, seconds: float, axis: str = "N") -> dict[str, Any]:
    times = {"time": {"fastqadapter": [seconds] * 5}}
    return facts("growth", "loss and gradient", axis=axis, at=at, shape={"N": at}, seconds=times, notes={})


def saved(path: Path, *cases: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"benchmarks": [{"extra_info": case} for case in cases]}))
    return path


def loaded(*cases: dict[str, Any]) -> list[Result]:
    return results_of({"benchmarks": [{"extra_info": copy.deepcopy(case)} for case in cases]})


def test_ratio_is_the_median_of_ratios_of_one_round() -> None:
    [result] = loaded(facts())
    assert result.ratio("peer", "fastqadapter") == pytest.approx(3.0)  # of 3, 2, 4, 3, 3
    assert result.median("peer") == 0.3 and result.quartiles("peer") == (0.3, 0.3)
    assert result.labels == ["gemms", "fastqadapter", "peer"] and result.floor == "gemms"


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_exponent_of_a_power_is_found(power: float) -> None:
    assert fitted_exponent({x: 3.0 * x**power for x in (1, 2, 8, 32)}) == pytest.approx(power)


def test_exponent_of_one_point_is_unknown() -> None:
    assert math.isnan(fitted_exponent({2: 1.0}))


def test_table_of_a_case_has_every_figure() -> None:
    [result] = loaded(facts(backward_seconds={"fastqadapter": [0.02] * 5}))
    lines = report.case_table(result).splitlines()
    assert (
        lines[0] == "| method | median | quartiles | times ours | times floor | backward | extra MiB | off by | note |"
    )
    assert lines[2].startswith("| gemms | 50 ms |") and lines[2].endswith("| floor |")
    assert lines[3] == "| **fastqadapter** | 100 ms | 100 ms to 100 ms | 1.00 | 2.00 | 20 ms | 1 | 1.0e-03 |  |"
    assert "| peer | 300 ms |" in lines[4] and "another loss" in lines[4]


def test_tables_list_who_was_not_measured_and_fit_exponents() -> None:
    text = report.tables(loaded(facts(), decoding(), sweep(10, 0.1), sweep(20, 0.2), sweep(40, 0.4)))
    assert "Not measured here: other: it needs a GPU." in text
    assert "| **fastqadapter** | 12 ms | 12 ms to 12 ms | 1.00 | 1.20 | 333 | 200 ms | 2.00 | 1.00 |" in text
    assert "| fastqadapter | 100 ms | 200 ms | 400 ms | 1.00 |" in text
    assert "The same, extra MiB:" in text and "| peer | 30 | 30 | 30 |" in text


def test_summary_has_step_loss_and_decoding() -> None:
    text = report.summary(loaded(decoding(), facts("step", "a step"), facts()))
    assert [line for line in text.splitlines() if "**" in line and "(a " in line] == [
        "| **Training step, forward and backward** (a step) |  |  |  |",
        "| **Loss of pairs from hidden states, with its gradient** (a head) |  |  |  |",
        "| **Generation** (a model) |  |  |  |",
    ]
    assert "| other | not measured |  | it needs a GPU |" in text


@pytest.mark.parametrize(
    ("value", "text"), [(1.234, "1.23 s"), (0.0123, "12.3 ms"), (0.9996, "1000 ms"), (2e-6, "2 us"), (1500, "1500 s")]
)
def test_seconds_as_text(value: float, text: str) -> None:
    assert report.seconds(value) == text


def test_results_file_keeps_the_sections_of_other_machines(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    report.update_results_file(path, {"measured: A": "first", "predictions": "none"})
    report.update_results_file(path, {"measured: B": "of B"})
    report.update_results_file(path, {"measured: A": "second\n\nwith two parts"})
    text = path.read_text()
    assert text.startswith("# Benchmark results")
    assert [text.count(each) for each in ("first", "second", "of B", "none")] == [0, 1, 1, 1]


def test_predictions_are_called_so() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    text = report.predicted_section()
    assert text.startswith("## GPUs: predictions\n\nNothing in this section was measured.")
    assert "| H100 | Llama-3-8B (D 4096, V 128256) | 18.4 ms | 19.6 ms | 1.06 |" in text


def test_every_plot_is_drawn_from_what_there_is(tmp_path: Path) -> None:
    cases = loaded(facts("step"), facts(), facts(title="another head"), decoding(), sweep(10, 0.1), sweep(20, 0.2))
    drawn = plots.draw_all(cases, tmp_path)
    assert {path.stem for path in drawn} == {
        "training_step", "loss_by_shape", "loss_memory", "time_per_token", "growth",
    }  # fmt: skip
    for path in drawn:
        assert path.stat().st_size > 1000 and path.with_suffix(".png").stat().st_size > 1000
    assert "another head" in (tmp_path / "loss_by_shape.svg").read_text()
    assert plots.draw_all(loaded(facts("files")), tmp_path / "none") == [tmp_path / "none" / "loss_memory.svg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("{", "does not hold"), ("[]", "does not hold"), ('{"benchmarks": [{}]}', "does not hold")],
)
def test_files_that_are_no_results_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(path)


def test_slower_machine_is_not_slower_code() -> None:
    """Everything takes twice as long: beside its anchor nothing changed."""
    new = facts()
    new["seconds"] = {"time": {label: [2 * each for each in times] for label, times in new["seconds"]["time"].items()}}
    [change] = compare.compare(loaded(facts()), loaded(new))
    assert change.slowdown == pytest.approx(1.0) and change.anchor == "gemms" and change.after == 0.2


def test_slower_code_is_found() -> None:
    new = facts()
    new["seconds"]["time"]["fastqadapter"] = [0.15, 0.15, 0.3, 0.15, 0.15]
    [change] = compare.compare(loaded(facts()), loaded(new))
    assert change.slowdown == pytest.approx(1.5)
    assert "| SLOWER | loss: a head, fastqadapter, time | 100 ms | 150 ms | 1.50 | gemms |" in compare.report(
        [change], 1.4
    )
    assert "SLOWER" not in compare.report([change], 1.6)


def test_both_times_of_decoding_are_compared_beside_the_base() -> None:
    changes = compare.compare(loaded(decoding()), loaded(decoding()))
    assert [(change.anchor, change.slowdown) for change in changes] == [("base", 1.0)] * 2


def test_case_without_an_anchor_is_compared_in_seconds() -> None:
    [change] = compare.compare(loaded(sweep(10, 0.1)), loaded(sweep(10, 0.3)))
    assert change.anchor is None and change.slowdown == pytest.approx(3.0)


def test_sweeps_of_one_size_are_not_mixed_up() -> None:
    both = sweep(512, 0.1), sweep(512, 0.4, axis="D")
    assert [change.slowdown for change in compare.compare(loaded(*both), loaded(*both))] == [1.0, 1.0]


def test_what_the_new_run_has_not_is_named() -> None:
    other = facts(title="another head")
    fewer = decoding()
    fewer["seconds"] = {"per_token": {"fastqadapter, prompt": [1.0] * 5, **fewer["seconds"]["per_token"]}}
    old, new = loaded(facts(), other, fewer), loaded(facts(), decoding())
    assert compare.not_compared(old, new) == ["another head", "a model, fastqadapter, prompt"]


def test_runs_without_a_common_case_are_refused() -> None:
    with pytest.raises(ValueError, match="no case in common; the old one has: a head"):
        compare.compare(loaded(facts()), loaded(facts(title="other")))


# The command


def test_command_compares_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = facts()
    slow["seconds"]["time"]["fastqadapter"] = [0.15] * 5
    old, new = saved(tmp_path / "old.json", facts()), saved(tmp_path / "new.json", slow)
    assert cli.main(["bench", "--compare", str(old), str(old)]) == 0
    assert "none of 1 times became more than 1.25 times slower" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--compare", str(old), str(new)])
    assert stop.value.code == 1
    assert "1 of 1 times became more than 1.25 times slower" in capsys.readouterr().err
    assert cli.main(["bench", "--compare", str(old), str(new), "--max_slowdown", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "4"], "4 is too few: at least 5"),
        (["--rounds", "many"], "invalid integer value: 'many'"),
        (["--quick", "--full"], "not allowed with argument"),
        (["--only", "lunch"], "invalid choice: 'lunch'"),
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: no such file"),
        (["--compare", "a", "b", "c"], "--compare takes one or two files, not 3"),
        (["--compare", "nowhere.json"], "cannot read nowhere.json"),
        (["--only", "loss", "ops"], "--only ops: this suite has nothing for a quick run; add --full"),
        (["--only", "loss", "--results", "R.md"], "a part of a run would replace the whole section"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--max_slowdown", "inf"], "--max_slowdown inf: a finite ratio"),
        (["--compare", "fastqadapter-bench/benchmark.json"], "the run would replace it; copy it, or name another"),
        (["--results", "nowhere/R.md"], "--results nowhere/R.md: name a file, in a folder that is there"),
        (["--results", "mine.md"], "--results mine.md: holds something else than results"),
        (["--data", "words.jsonl"], "words.jsonl"),
        (["--data", "words.jsonl", "--output_dir", "mine.md"], "mine.md: a file of that name is there"),
        (["--max_slowdown", "0"], "--max_slowdown 0.0: a finite ratio above 0 is needed"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.md").write_text("my own words\n")
    Path("words.jsonl").write_text("no JSON\n")
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (extra bench)")
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("times", [[0.0] * 5, [math.nan] * 5, ["fast"] * 5, [], [0.1] * 4, None])
def test_a_file_with_other_times_is_refused(tmp_path: Path, times: Any) -> None:
    seconds = {"fastqadapter": [0.1] * 5, "peer": times}
    with pytest.raises(ValueError, match=r"bad.json does not hold results of"):
        read_results(saved(tmp_path / "bad.json", facts(seconds={"time": seconds})))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastqadapter.commands.bench.NEEDED", ("no_such_package",))
    assert cli.main(["bench"]) == 2
    assert 'the benchmarks need no_such_package: pip install "fastqadapter[bench]"' in capsys.readouterr().err


def test_merged_report_has_all_cases() -> None:
    reports = [{"benchmarks": [1], "version": "5"}, {"benchmarks": [2, 3]}]
    assert results.merged(reports) == {"benchmarks": [1, 2, 3], "version": "5"}


def test_growth_collects_the_points() -> None:
    assert growth(loaded(sweep(10, 0.1), sweep(20, 0.2))) == {"N": {"fastqadapter": {10: 0.1, 20: 0.2}}}
