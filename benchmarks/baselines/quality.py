"""Train every method on the same pairs, measure all with `fastqadapter eval`, and write the table.

    python benchmarks/baselines/quality.py --data hh=TRAIN.jsonl,HELDOUT.jsonl --output_dir quality

Each run is kept in a folder of its own when it is done: stop the script when you like, and start it again to go on.
`--data demo` is the demo's own preference. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from methods import ADAPTER, RUN, TRAINED, Run
from tqdm import tqdm

from fastqadapter.demo.preference import preference_pairs
from fastqadapter.demo.smollm import demo_model_folder
from fastqadapter.evaluation.run import RESULTS

SEEDS = (0, 1, 2)
OURS = ("shared", "prompt", "separate")
Outcome = dict[str, Any]


def plan(model: str, train_pairs: str) -> dict[str, Run]:
    """All runs on one data set, by the name of their folder."""
    shared = {"model": model, "train_pairs": train_pairs}
    runs: dict[str, Run] = {}
    for kv_mode in OURS:
        for seed in SEEDS:
            runs[f"q-adapter-{kv_mode}-{seed}"] = Run("q-adapter", kv_mode=kv_mode, seed=seed, **shared)
    runs["q-adapter-logits"] = Run("q-adapter", kv_mode="separate", q_head="logits", **shared)
    runs["published"] = Run("published", learning_rate=5e-4, **shared)
    for beta in (0.1, 0.5):
        for rate in (5e-5, 2e-4):
            runs[f"dpo-{beta:g}-{rate:g}"] = Run("dpo", beta=beta, learning_rate=rate, **shared)
    runs["sft"] = Run("sft", learning_rate=2e-4, **shared)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", action="append", required=True, metavar="NAME=TRAIN,HELDOUT", help='or "demo"')
    parser.add_argument("--model", help="folder or hub id; default: the demo's SmolLM2-135M")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name begins so")
    parser.add_argument("--results", type=Path, help="write the tables as Markdown to this file")
    arguments = parser.parse_args()
    model = arguments.model or str(demo_model_folder())
    tables = []
    for entry in arguments.data:
        name, train_pairs, heldout = _files(entry, arguments.output_dir)
        chosen = {
            label: run for label, run in plan(model, train_pairs).items() if label.startswith(tuple(arguments.only))
        }
        for label, run in tqdm(chosen.items(), desc=name, unit="run"):
            outcome(arguments.output_dir / name / label, run, heldout)
        tables.append(table(name, list(finished(arguments.output_dir / name, chosen))))
    text = "\n\n".join(tables) + "\n"
    print(text)
    if arguments.results:
        arguments.results.write_text(text, encoding="utf-8")


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


def outcome(folder: Path, run: Run, heldout: str) -> None:
    """Train and measure one run, each in a process of its own, unless its result is there.

    Raises:
        SystemExit: the folder holds another run, or a process failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(dataclasses.asdict(run), indent=1) + "\n"
    if (folder / RUN).exists() and (folder / RUN).read_text(encoding="utf-8") != content:
        raise SystemExit(f"{folder}: holds a run with other settings; delete it, or give another --output_dir")
    (folder / RUN).write_text(content, encoding="utf-8")
    if not (folder / TRAINED).exists():
        _process(folder / "train.log", str(Path(__file__).with_name("methods.py")), str(folder))
    evaluation = ["-m", "fastqadapter", "eval", "--adapter", f"run={folder / ADAPTER}", "--dataset_name", heldout]
    sweep = "true" if run.method == "q-adapter" and run.seed == 0 else "false"
    _process(folder / "eval.log", *evaluation, "--output_dir", str(folder / "eval"), "--sweep", sweep, "--samples", "2")


def _process(log: Path, *command: str) -> None:
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{log}: exit code {done.returncode}: {log.read_text(encoding='utf-8')[-500:]}")


def finished(folder: Path, runs: Mapping[str, Run]) -> Iterator[tuple[Run, Outcome]]:
    for label, run in runs.items():
        trained = json.loads((folder / label / TRAINED).read_text(encoding="utf-8"))
        results = json.loads((folder / label / "eval" / RESULTS).read_text(encoding="utf-8"))
        yield run, {**trained, "evaluation": results["adapters"]["run"], "base": results["base"]}


HEADER = (
    *("method", "KV mode", "Q head", "seeds", "accuracy", "accuracy by seed", "KL, nats", "perplexity", "kept"),
    *("seconds", "MiB"),
)


def table(name: str, outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    """A row for each setting; those of several seeds are means, the interval is over the pairs of the first."""
    groups: dict[Run, list[Outcome]] = {}
    for run, found in outcomes:
        groups.setdefault(dataclasses.replace(run, seed=0), []).append(found)
    lines = [f"## {name}", "", "| " + " | ".join(HEADER) + " |", "| " + " | ".join("---" for _ in HEADER) + " |"]
    lines += ["| " + " | ".join(_row(run, own)) + " |" for run, own in groups.items()]
    return "\n".join(lines)


def _row(run: Run, own: Sequence[Outcome]) -> list[str]:
    rows = [each["evaluation"]["rows"][0] for each in own]
    accuracy = rows[0]["accuracy"]
    by_seed = ", ".join(f"{row['accuracy']['value']:.3f}" for row in rows)

    def mean(values: Sequence[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f}"

    ours = run.method in ("q-adapter", "published")
    label = {"q-adapter": "Q-Adapter", "published": "Q-Adapter, published objective", "dpo": "DPO", "sft": "SFT"}
    beta = "" if run.beta is None else f", beta {run.beta:g}"
    return [
        f"{label[run.method]} (lr {run.learning_rate:g}{beta})",
        {"published": "separate", "q-adapter": run.kv_mode}.get(run.method, "own"),
        {"published": "logits", "q-adapter": run.q_head}.get(run.method, "") if ours else "",
        str(len(own)),
        f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]",
        by_seed,
        mean([row["kl"] for row in rows], 4),
        mean([row["perplexity"] for row in rows], 2),
        f"{100 * statistics.mean(row['kept'] for row in rows):.1f}%",
        mean([each["seconds"] for each in own], 0),
        mean([each["peak_mib"] for each in own], 0),
    ]


if __name__ == "__main__":
    main()
