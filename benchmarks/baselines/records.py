"""What is kept of a run: one small JSON file, `FOLDER/DATA/RUN.json`, from which tables and plots are written anywhere.

It names no folder of the machine it ran on: model and pairs by their names alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from methods import Run

Outcome = dict[str, Any]  # what training and evaluation left: seconds, peak_mib, device, rows
Row = Mapping[str, Any]  # of an evaluation, at one setting of the dials

ROW = ("point", "accuracy", "margin", "kl", "perplexity", "kept")


def named(run: Run, data: str) -> Run:
    """The run without the folders of this machine."""
    return dataclasses.replace(run, model=Path(run.model).name, train_pairs=data)


def digest(*files: str) -> str:
    """Of the pairs, to be trained on and held out."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def write(path: Path, run: Run, data: str, trained: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Keep a run that is done: settings, digest of the data, cost of training, figures of `eval.json`."""
    rows = [{name: row[name] for name in ROW} for row in results["adapters"]["run"]["rows"]]
    content = {"run": dataclasses.asdict(run), "data": data, **trained, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> tuple[Run, Outcome]:
    """A run and what it left.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
        return Run(**outcome.pop("run")), outcome
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no outcome of a run ({error}): delete it") from None


def finished(folder: Path, labels: Iterable[str]) -> list[tuple[Run, Outcome]]:
    """The runs of one data set that are done, in the order of their labels, then others (as of another machine)."""
    files = {path.stem: path for path in sorted(folder.glob("*.json"))}
    order = dict.fromkeys([*(label for label in labels if label in files), *files])
    return [read(files[label]) for label in order]
