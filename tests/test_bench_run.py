"""`fastqadapter bench`, as a user runs it, on a tiny model: what it writes, how it goes on after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastqadapter.commands.bench import _check_peers, write_results
from fastqadapter_benchmarks.results import read_results
from fastqadapter_benchmarks.run_suites import _prepare, locked
from fastqadapter_benchmarks.settings import Settings
from words import save_workplace

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (extra bench)")
ROOT = Path(__file__).parents[1]
OPTIONS = "--peers", "eager", "published", "base model", "--output_dir", "out"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workplace(tmp_path_factory.mktemp("bench"), 60)


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastqadapter.cli", "bench", "--model", "base", "--data", "pairs.jsonl"]
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def first(workplace: Path) -> subprocess.CompletedProcess[str]:
    """Every suite of a quick run, against two peers."""
    return bench(workplace, *OPTIONS)


def test_run_writes_all_it_promises(workplace: Path, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stdout + first.stderr
    assert "no GPU: the shapes of Llama-3-8B, Qwen2.5-7B and Gemma are skipped" in first.stdout
    found = read_results(workplace / "out" / "benchmark.json")
    assert {result.suite for result in found} == {"step", "loss", "decode"}
    for result in found:
        assert result.title.startswith("base")
        assert all(len(times) == 5 for times in result.seconds[result.metric].values())
        assert result.machine["threads"] == 2 and result.machine["versions"]["torch"]
    loss = next(result for result in found if result.suite == "loss")
    assert set(loss.labels) >= {"eager", "published"} and loss.errors[loss.ours] < loss.errors["published"] + 0.01
    assert (workplace / "out" / "summary.md").read_text().strip() in first.stdout
    assert all((workplace / "out" / "plots" / f"{name}.png").is_file() for name in ("training_step", "time_per_token"))


def test_results_file_has_the_section_and_its_plots(
    workplace: Path, first: subprocess.CompletedProcess[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first.returncode == 0
    monkeypatch.chdir(workplace)
    write_results(Path("RESULTS.md"), read_results(Path("out/benchmark.json")), "fastqadapter bench --quick")
    text = Path("RESULTS.md").read_text()
    assert "## Measured on a CPU" in text and "fastqadapter bench --quick" in text
    shown = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert shown and all(Path(plot).is_file() for plot in shown)


def test_resume_runs_only_what_is_missing(workplace: Path, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0
    (workplace / "out" / "suites" / "loss.json").unlink()
    again = bench(workplace, *OPTIONS, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "step: kept" in again.stdout and "decode: kept" in again.stdout and "test_loss.py" in again.stdout
    other = bench(workplace, "--output_dir", "out", "--resume")
    assert other.returncode == 2 and "has suites of another run" in other.stderr


def test_a_suite_that_fails_is_named_and_the_others_are_kept(workplace: Path) -> None:
    """Pairs that are enough for the loss, but not for what is collated."""
    lines = (workplace / "pairs.jsonl").read_text().splitlines()[:3]
    (workplace / "few.jsonl").write_text("\n".join(lines) + "\n")
    options = "--data", "few.jsonl", "--peers", "eager", "--output_dir", "few"
    done = bench(workplace, *options, "--only", "files", "loss")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "has 3 pairs of at most" in done.stdout  # the reason
    assert "FAILED, and not or only partly in the tables: files" in done.stderr
    assert {result.suite for result in read_results(workplace / "few" / "benchmark.json")} >= {"loss"}
    again = bench(workplace, *options, "--only", "step", "loss")
    assert again.returncode == 2 and "has 3 pairs of at most" in again.stderr  # before anything is run or lost
    with pytest.raises(ValueError, match="--peers nobody: no competitor has that in its name; these ran"):
        _check_peers(["eager", "nobody"], read_results(workplace / "few" / "benchmark.json"))


def test_a_folder_is_for_one_run(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match="another run is using it; name another folder"),
        locked(tmp_path),
    ):
        pass


def test_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "suites").mkdir()
    for name in ("benchmark.json", "suites/loss.json", "suites/mine.json", "mine.md"):
        (tmp_path / name).write_text(name)
    _prepare(tmp_path, ["key"], resume=False)
    assert (tmp_path / "mine.md").is_file() and not (tmp_path / "benchmark.json").exists()
    for name in ("benchmark.json", "suites/loss.json", "suites/mine.json"):
        assert (tmp_path / "previous" / name).read_text() == name


def test_a_torn_suite_runs_again(tmp_path: Path) -> None:
    assert _prepare(tmp_path, ["key"], resume=False) == set()
    (tmp_path / "suites" / "loss.json").write_text('{"benchmarks": [1')
    (tmp_path / "suites" / "step.json").write_text('{"benchmarks": [1]}')
    assert _prepare(tmp_path, ["key"], resume=True) == {"step"}
    assert not (tmp_path / "suites" / "loss.json").exists()
    assert Settings().asks_for("anyone") and Settings(peers=("trl",)).asks_for("TRL chunked log-probs, twice")
