"""Train every method on the same pairs, measure all with `fastqadapter eval`, and write the tables.

    python benchmarks/baselines/quality.py --data hh=TRAIN.jsonl,HELDOUT.jsonl --data demo --output_dir quality
    python benchmarks/baselines/quality.py --results benchmarks/QUALITY.md

A run that is done leaves its figures in `--outcomes`, beside this script unless told otherwise, and is not run again:
stop the script when you like, and start it again to go on. Without `--data` nothing is run, only written.
`--data demo` is the demo's own preference. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import records
from frontier_plot import draw
from methods import ADAPTER, RUN, TRAINED, Run
from plans import PLANS, eval_options
from tables import HEAD, section
from tqdm import tqdm

from fastqadapter.demo.preference import preference_pairs
from fastqadapter.demo.smollm import demo_model_folder
from fastqadapter.evaluation.run import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", action="append", default=[], metavar="NAME=TRAIN,HELDOUT", help='or "demo"')
    parser.add_argument("--model", help="folder or hub id; default: the demo's SmolLM2-135M")
    parser.add_argument("--output_dir", type=Path, default=Path("quality"), help="adapters, logs, evaluations")
    parser.add_argument("--outcomes", type=Path, default=Path(__file__).with_name("outcomes"), help="figures of runs")
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=[*PLANS], help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; more than 1 falsifies their seconds")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name begins so")
    parser.add_argument("--results", type=Path, help="write the tables to this Markdown file, plots beside it")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: at least 1")
    failures = [failure for entry in arguments.data for failure in _run_all(entry, arguments)]
    data = finished(arguments.outcomes)
    print("\n\n".join(section(*each) for each in data.items()))
    if arguments.results:
        write_report(data, arguments.results)
    if failures:
        raise SystemExit(f"{len(failures)} runs failed")


def finished(folder: Path) -> dict[str, list[tuple[Run, records.Outcome]]]:
    """The runs that are done, by data set, in the order of the plans."""
    labels = [label for each in PLANS.values() for label in each("", "")]
    data = {path.name: records.finished(path, labels) for path in sorted(folder.glob("*")) if path.is_dir()}
    return {name: runs for name, runs in data.items() if runs}


def write_report(data: Mapping[str, Sequence[tuple[Run, records.Outcome]]], path: Path) -> None:
    """The tables, a section for each data set, and their plots in `plots/quality` beside them."""
    sections = [section(*each) for each in data.items()]
    path.write_text("\n\n".join([HEAD, *sections]) + "\n", encoding="utf-8")
    for each in data.items():
        draw(*each, path.parent / "plots" / "quality")


def _run_all(entry: str, arguments: argparse.Namespace) -> list[str]:
    """Run what is not done on one data set; returns why runs failed."""
    model = arguments.model or str(demo_model_folder())
    name, train_pairs, heldout = _files(entry, arguments.output_dir)
    runs = {label: run for each in arguments.plan for label, run in PLANS[each](model, train_pairs).items()}
    chosen = {label: run for label, run in runs.items() if label.startswith(tuple(arguments.only))}
    if not chosen:
        raise SystemExit(f"--only {' '.join(arguments.only)}: no run begins so; there are {', '.join(runs)}")
    jobs = [
        (arguments.output_dir / name / label, run, heldout, arguments.outcomes / name / f"{label}.json")
        for label, run in chosen.items()
    ]
    failures = []
    with ThreadPool(arguments.jobs) as pool:
        for failure in tqdm(pool.imap_unordered(_outcome, jobs), desc=name, unit="run", total=len(jobs)):
            if failure:
                tqdm.write(failure)
                failures.append(failure)
    return failures


def _files(entry: str, output: Path) -> tuple[str, str, str]:
    """Name, training pairs and held-out pairs."""
    if entry != "demo":
        name, _, files = entry.partition("=")
        train_pairs, comma, heldout = files.partition(",")
        if not comma:
            raise SystemExit(f"--data {entry}: give NAME=TRAIN.jsonl,HELDOUT.jsonl or demo")
        return name, train_pairs, heldout
    paths = []
    for label, rows in zip(("train", "heldout"), preference_pairs(seed=0), strict=True):
        path = output / "demo" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths.append(str(path))
    return "demo", *paths


def _outcome(job: tuple[Path, Run, str, Path]) -> str:
    """Why a run failed, so that the others go on; nothing where it did not."""
    try:
        outcome(*job)
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)
    return ""


def outcome(folder: Path, run: Run, heldout: str, kept: Path) -> None:
    """Train and measure one run, each in a process of its own, and keep its figures; nothing where they are there.

    Raises:
        ValueError: the folder, or what is kept, is of another run.
        RuntimeError: a process failed.
    """
    named, data = records.named(run, kept.parent.name), records.digest(run.train_pairs, heldout)
    if kept.exists():
        before, found = records.read(kept)
        if (before, found.get("data")) != (named, data):
            raise ValueError(f"{kept}: of a run with other settings or pairs; delete it, or give other --outcomes")
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(dataclasses.asdict(run), indent=1) + "\n"
    if (folder / RUN).exists() and (folder / RUN).read_text(encoding="utf-8") != content:
        raise ValueError(f"{folder}: holds a run with other settings; delete it, or give another --output_dir")
    (folder / RUN).write_text(content, encoding="utf-8")
    if not (folder / TRAINED).exists():
        _process(folder / "train.log", str(Path(__file__).with_name("methods.py")), str(folder))
    evaluation = ["-m", "fastqadapter", "eval", "--adapter", f"run={folder / ADAPTER}", "--dataset_name", heldout]
    options = ["--output_dir", str(folder / "eval"), "--samples", "2", "--batch_size", "16"]
    _process(folder / "eval.log", *evaluation, *options, *eval_options(folder.name))
    records.write(kept, named, data, _read(folder / TRAINED), _read(folder / "eval" / RESULTS))


def _process(log: Path, *command: str) -> None:
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{log}: exit code {done.returncode}: {log.read_text(encoding='utf-8')[-500:]}")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
