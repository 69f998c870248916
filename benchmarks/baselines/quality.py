"""Train every method on the same pairs, measure all with `fastqadapter eval`, and write the table.

    python benchmarks/baselines/quality.py --data hh=TRAIN.jsonl,HELDOUT.jsonl --output_dir quality

Each run is kept in a folder of its own when it is done: stop the script when you like, and start it again to go on;
`--results benchmarks/QUALITY.md` then writes what is there.
`--data demo` is the demo's own preference. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from methods import ADAPTER, RUN, TRAINED, Run
from tables import HEAD, Outcome, section
from tqdm import tqdm

from fastqadapter.demo.preference import preference_pairs
from fastqadapter.demo.smollm import demo_model_folder
from fastqadapter.evaluation.run import RESULTS

SEEDS = (0, 1, 2)
OURS = ("shared", "prompt", "separate")
SWEPT = "q-adapter-shared-0"

# What is changed, one at a time, from the run that the first of ours is.
SEARCH: dict[str, tuple[Any, ...]] = {
    "learning_rate": (3e-4, 2e-3, 4e-3),
    "divisor": ("1", "32", "max_length"),
    "beta": (0.0, 0.1, 1.0),
    "epochs": (1.0, 4.0),
    "rank": (2, 32),
}


def plan(model: str, train_pairs: str) -> dict[str, Run]:
    """The runs that are compared, by the name of their folder."""
    shared = {"model": model, "train_pairs": train_pairs}
    runs: dict[str, Run] = {}
    for beta, rate in ((0.1, 5e-5), (0.1, 2e-4), (0.1, 5e-4), (0.5, 2e-4), (0.03, 2e-4)):
        runs[f"dpo-{beta:g}-{rate:g}"] = Run("dpo", beta=beta, learning_rate=rate, **shared)
    for kv_mode in OURS:
        for seed in SEEDS:
            runs[f"q-adapter-{kv_mode}-{seed}"] = Run("q-adapter", kv_mode=kv_mode, seed=seed, **shared)
    for rate in (1e-4, 5e-4, 1e-3):
        runs[f"published-{rate:g}"] = Run("published", learning_rate=rate, **shared)
    for rate in (2e-4, 1e-3):
        runs[f"sft-{rate:g}"] = Run("sft", learning_rate=rate, **shared)
    runs["q-adapter-logits"] = Run("q-adapter", kv_mode="separate", q_head="logits", **shared)
    return runs


def search(model: str, train_pairs: str) -> dict[str, Run]:
    """Runs of ours around the first, to see what decides."""
    runs = {}
    for seed in SEEDS[:2]:
        center = Run("q-adapter", model=model, train_pairs=train_pairs, seed=seed)
        for name, values in SEARCH.items():
            for value in values:
                runs[f"{name}-{value}-{seed}"] = dataclasses.replace(center, **{name: value})
    return runs


PLANS = {"compare": plan, "search": search}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", action="append", required=True, metavar="NAME=TRAIN,HELDOUT", help='or "demo"')
    parser.add_argument("--model", help="folder or hub id; default: the demo's SmolLM2-135M")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=[*PLANS], help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; more than 1 falsifies their seconds")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name begins so")
    parser.add_argument("--results", type=Path, help="write the tables as Markdown to this file")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: at least 1")
    model = arguments.model or str(demo_model_folder())
    sections, failures = [], []
    for entry in arguments.data:
        name, train_pairs, heldout = _files(entry, arguments.output_dir)
        runs = {label: run for each in arguments.plan for label, run in PLANS[each](model, train_pairs).items()}
        chosen = {label: run for label, run in runs.items() if label.startswith(tuple(arguments.only))}
        if not chosen:
            parser.error(f"--only {' '.join(arguments.only)}: no run begins so; there are {', '.join(runs)}")
        with ThreadPool(arguments.jobs) as pool:
            jobs = [(arguments.output_dir / name / label, run, heldout) for label, run in chosen.items()]
            for failure in tqdm(pool.imap_unordered(_outcome, jobs), desc=name, unit="run", total=len(jobs)):
                if failure:
                    tqdm.write(failure)
                    failures.append(failure)
        sections.append(section(name, list(finished(arguments.output_dir / name, chosen))))
    print("\n\n".join(sections))
    if arguments.results:
        arguments.results.write_text("\n\n".join([HEAD, *sections]) + "\n", encoding="utf-8")
    if failures:
        raise SystemExit(f"{len(failures)} runs failed")


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


def _outcome(job: tuple[Path, Run, str]) -> str:
    """Why a run failed, so that the others go on; nothing where it did not."""
    try:
        outcome(*job)
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)
    return ""


def outcome(folder: Path, run: Run, heldout: str) -> None:
    """Train and measure one run, each in a process of its own, unless its result is there.

    Raises:
        ValueError: the folder holds another run.
        RuntimeError: a process failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(dataclasses.asdict(run), indent=1) + "\n"
    if (folder / RUN).exists() and (folder / RUN).read_text(encoding="utf-8") != content:
        raise ValueError(f"{folder}: holds a run with other settings; delete it, or give another --output_dir")
    (folder / RUN).write_text(content, encoding="utf-8")
    if not (folder / TRAINED).exists():
        _process(folder / "train.log", str(Path(__file__).with_name("methods.py")), str(folder))
    if _read(folder / "eval" / RESULTS).get("adapters") is not None:
        return
    evaluation = ["-m", "fastqadapter", "eval", "--adapter", f"run={folder / ADAPTER}", "--dataset_name", heldout]
    sweep = str(folder.name == SWEPT).lower()
    options = ["--output_dir", str(folder / "eval"), "--sweep", sweep, "--samples", "2", "--batch_size", "16"]
    _process(folder / "eval.log", *evaluation, *options)


def _process(log: Path, *command: str) -> None:
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{log}: exit code {done.returncode}: {log.read_text(encoding='utf-8')[-500:]}")


def _read(path: Path) -> Outcome:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def finished(folder: Path, runs: Mapping[str, Run]) -> Iterator[tuple[Run, Outcome]]:
    for label, run in runs.items():
        trained, results = _read(folder / label / TRAINED), _read(folder / label / "eval" / RESULTS)
        if "adapters" in results:
            yield run, {**trained, "evaluation": results["adapters"]["run"], "base": results["base"]}


if __name__ == "__main__":
    main()
