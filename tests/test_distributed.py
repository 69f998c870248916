"""Several processes compute what one computes: gradients, evaluations, and a run that goes on with other processes.

What one process finds is found in the process of the tests. Starting two takes ten seconds, so that those that only
compute carry out all their tasks in one start.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastqadapter as fqa
from distributed_worker import Task, carry_out
from fastqadapter.monitor import last_checkpoint
from generation_cases import each_mode
from tiny import MODES, tiny_base

WORKER = Path(__file__).with_name("distributed_worker.py")
# An epsilon that large leaves Adam its state, and takes the sign of gradients that are but rounding out of the weights.
ADAM = {"learning_rate": 1.0, "adam_epsilon": 1.0, "logging_steps": 1}
SAVED = {**ADAM, "save_strategy": "steps", "save_steps": 1}
FOUR_STEPS = Task(rows=16, batch_size=4, settings=SAVED)  # of four pairs
each_sharding = pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])


def by_two(task: Task, **changes: Any) -> Task:
    """The same for each of two processes."""
    return dataclasses.replace(task, batch_size=task.batch_size // 2, **changes)


def start_two(folder: Path, *tasks: Task) -> tuple[list[int], str]:
    """Exit codes of two processes that carry out the tasks, and what they said."""
    folder.mkdir(exist_ok=True)
    (folder / "tasks.json").write_text(json.dumps([dataclasses.asdict(task) for task in tasks]))
    paths = [str(WORKER.parent), str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    # accelerate wants an address; gloo meets at a file, and a file is for one meeting
    environment |= {"PYTHONFAULTHANDLER": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    if any(task.deepspeed for task in tasks):
        environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    environment["RUN"] = str(len(list(folder.glob("rendezvous-*"))))
    workers, logs = [], [folder / f"log{rank}" for rank in range(2)]
    for rank, log in enumerate(logs):
        ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            command = [sys.executable, str(WORKER), str(folder)]
            workers.append(subprocess.Popen(command, env={**environment, **ranked}, stdout=file, stderr=file))
    try:
        for worker in workers:
            worker.wait(timeout=300)
    except subprocess.TimeoutExpired:
        for worker in workers:
            worker.send_signal(signal.SIGABRT)  # each writes where it hangs
            worker.wait()
    return [worker.returncode for worker in workers], "\n".join(log.read_text()[-3000:] for log in logs)


def found_by_two(folder: Path, *tasks: Task) -> list[Any]:
    codes, said = start_two(folder, *tasks)
    assert codes == [0, 0], said
    return list(json.loads((folder / "found.json").read_text()))


def assert_same(found: Any, expected: Any, *names: str) -> None:
    """To 1e-5 of the largest."""
    for name in names:
        scale = max(map(abs, expected[name]))
        assert scale > 0
        assert max(abs(a - b) for a, b in zip(found[name], expected[name], strict=True)) < 1e-5 * scale, name


GRADIENT = Task(batch_size=8)
TIED = {
    mode: Task(rows=16, batch_size=8, kv_mode=mode, tied=True, settings=ADAM)  # type: ignore[arg-type]
    for mode in MODES
}
EVALUATION = Task("eval", batch_size=4)
BY_TWO = {
    "ddp": dataclasses.replace(GRADIENT, batch_size=2, accumulate=2),
    "fsdp2": dataclasses.replace(GRADIENT, batch_size=2, accumulate=2, fsdp=True),
    "fsdp2, bf16": dataclasses.replace(GRADIENT, batch_size=4, fsdp=True, settings={**ADAM, "bf16": True}),
    "evaluation": by_two(EVALUATION),
    **{mode: by_two(task, fsdp=True) for mode, task in TIED.items()},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes find, by name."""
    found = found_by_two(tmp_path_factory.mktemp("two"), *BY_TWO.values())
    return dict(zip(BY_TWO, found, strict=True))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_gradient(tmp_path: Path, two: dict[str, Any], sharding: str) -> None:
    """8 pairs in one batch, and as 2 processes x 2 micro-batches x 2 pairs. One plain SGD step with rate 1 moves the
    weights by the gradient itself. An evaluation follows: transformers allows none before the training with FSDP2."""
    one = carry_out(GRADIENT, tmp_path)
    assert_same(two[sharding], one, "moved", "losses")
    assert two[sharding]["evaluation"] == pytest.approx(one["evaluation"], rel=1e-3, abs=1e-5)


def test_losses_under_bf16_are_not_rounded(two: dict[str, Any]) -> None:
    assert two["fsdp2, bf16"]["losses"] == pytest.approx([math.log(2)], rel=1e-6)


@each_mode
def test_sharded_head(tmp_path: Path, two: dict[str, Any], kv_mode: str) -> None:
    """A head that is the embedding too is sharded together with it and the last norm; two steps, since the second finds
    what the first has left."""
    one = carry_out(TIED[kv_mode], tmp_path)
    assert len(one["losses"]) == 2
    assert_same(two[kv_mode], one, "losses", "weights")


def test_evaluation_counts_every_pair_once(tmp_path: Path, two: dict[str, Any]) -> None:
    """5 pairs do not divide among two processes; those repeated to fill the last batch must not count."""
    assert two["evaluation"] == pytest.approx(carry_out(EVALUATION, tmp_path), rel=1e-4)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process finds that nobody interrupts."""
    return carry_out(FOUR_STEPS, tmp_path_factory.mktemp("whole"))


@each_sharding
def test_goes_on_after_a_worker_was_killed(tmp_path: Path, four_steps: Any, fsdp: bool) -> None:
    """The second rank is killed behind step 3, before that is saved. The checkpoint of step 2 is whole, and the run
    goes on from it as if nothing had been: with two processes again, and with one."""
    task = by_two(FOUR_STEPS, fsdp=fsdp)
    codes, said = start_two(tmp_path, dataclasses.replace(task, dies_after=3))
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGABRT), said  # it notices
    checkpoint = last_checkpoint(str(tmp_path))
    assert checkpoint is not None and checkpoint.endswith("checkpoint-2")
    fqa.QAdapterModel.from_pretrained(tiny_base("llama"), checkpoint)
    shutil.copytree(tmp_path, tmp_path / "copy")
    [found] = found_by_two(tmp_path, dataclasses.replace(task, resume=True))
    assert_same(found, four_steps, "losses", "weights")
    if not fsdp:  # its checkpoints are for FSDP, with however many processes
        assert_same(
            carry_out(dataclasses.replace(FOUR_STEPS, resume=True), tmp_path / "copy"), four_steps, "losses", "weights"
        )


@each_mode
def test_deepspeed_zero3(tmp_path: Path, kv_mode: str) -> None:
    """With the configuration of the examples; what a stand-in for DeepSpeed shows is in test_sharded.py."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    task = Task(rows=16, batch_size=8, kv_mode=kv_mode, settings={**ADAM, "optim": "sgd"})  # type: ignore[arg-type]
    one = carry_out(task, tmp_path / "one")
    [two] = found_by_two(tmp_path / "two", by_two(task, deepspeed=True))
    assert_same(two, one, "losses", "weights")


def test_goes_on_with_more_processes(tmp_path: Path, four_steps: Any) -> None:
    carry_out(FOUR_STEPS, tmp_path)
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    [found] = found_by_two(tmp_path, by_two(FOUR_STEPS, resume=True))
    assert_same(found, four_steps, "losses", "weights")
