"""Two processes compute what one computes: the gradient of an optimizer step, and the means of an evaluation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")


def run_worker(folder: Path, processes: int, task: str, batch_size: int, accumulate: int) -> Any:
    folder.mkdir()
    command = [sys.executable, str(WORKER), task, str(folder), str(batch_size), str(accumulate)]
    paths = [str(WORKER.parent), str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONFAULTHANDLER": "1", "MASTER_ADDR": "127.0.0.1"}  # accelerate wants an address, gloo a file
    workers, logs = [], [folder / f"log{rank}" for rank in range(processes)]
    for rank, log in enumerate(logs):
        ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        with log.open("w") as file:
            workers.append(subprocess.Popen(command, env={**environment, **ranked}, stdout=file, stderr=file))
    try:
        for worker in workers:
            worker.wait(timeout=300)
    except subprocess.TimeoutExpired:
        for worker in workers:
            worker.send_signal(signal.SIGABRT)  # each writes where it hangs
            worker.wait()
    said = "\n".join(log.read_text()[-3000:] for log in logs)
    assert [worker.returncode for worker in workers] == [0] * processes, said
    return json.loads((folder / "found.json").read_text())


def test_gradient_of_two_processes(tmp_path: Path) -> None:
    """8 pairs in one batch, and as 2 processes x 2 micro-batches x 2 pairs."""
    expected = run_worker(tmp_path / "one", 1, "train", 8, 1)
    found = run_worker(tmp_path / "two", 2, "train", 2, 2)
    scale = max(map(abs, expected))
    assert scale > 0
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5 * scale


def test_evaluation_by_two_processes_counts_every_pair_once(tmp_path: Path) -> None:
    """5 pairs do not divide among two processes; those repeated to fill the last batch must not count."""
    expected = run_worker(tmp_path / "one", 1, "eval", 5, 1)
    found = run_worker(tmp_path / "two", 2, "eval", 2, 1)
    assert found == pytest.approx(expected, rel=1e-4)
