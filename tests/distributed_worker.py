"""One process of `test_distributed.py`: carries out what `tasks.json` says, and lets rank 0 write what came out."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

import fastqadapter as fqa
from fastqadapter.sharding import whole
from tiny import lora_parameters, tiny_base
from trainers import TOKENIZER, arguments
from words import word_rows

LAUNCH = Path(__file__).parents[1] / "examples" / "launch"
FSDP = {"version": 2}  # layer by layer, as the model says
PLAIN_SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


@dataclasses.dataclass(frozen=True)
class Task:
    """What the processes do, together."""

    what: str = "train"  # or "eval"
    batch_size: int = 4  # of a process
    accumulate: int = 1
    rows: int = 8
    kv_mode: fqa.config.KVMode = "separate"
    tied: bool = False  # LM head and embedding
    fsdp: bool = False
    deepspeed: bool = False  # ZeRO-3
    settings: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(PLAIN_SGD))
    resume: bool = False
    dies_after: int | None = None  # optimizer steps, of the last rank


class DiesAfter(TrainerCallback):
    """Kills its own process, as a scheduler would, when a step is over but not yet saved."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = f"file://{folder.resolve()}/rendezvous-{os.environ['RUN']}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=processes)
    if os.environ.get("DS_ACCELERATOR"):
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    tasks = [Task(**task) for task in json.loads((folder / "tasks.json").read_text())]
    found = [carry_out(task, folder, rank == processes - 1) for task in tasks]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    # What is tested is done. The end of a process with gloo's threads in it is torch's: one in some hundred ended in an
    # abort, one never.
    dist.barrier()
    os._exit(0)


def carry_out(task: Task, folder: Path, is_last: bool = True) -> Any:
    """The result of a task, of one process or of all together."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = make_trainer(task, folder, is_last)
    return train(trainer, task.resume) if task.what == "train" else evaluate(trainer)


def make_trainer(task: Task, folder: Path, is_last: bool) -> fqa.QAdapterTrainer:
    settings = {"num_train_epochs": 1, **task.settings}
    if dist.is_initialized():
        settings["ddp_backend"] = "gloo"
    if task.deepspeed:
        ours = json.loads((LAUNCH / "deepspeed_zero3.json").read_text())
        settings["deepspeed"] = ours | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if task.fsdp:
        settings |= {"fsdp": True, "fsdp_config": dict(FSDP)}
    args = arguments(
        folder,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=task.batch_size,
        gradient_accumulation_steps=task.accumulate,
        **settings,
    )
    if task.fsdp:  # accelerate shards over accelerators alone; torch, which does the work, over these processes too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.manual_seed(0)
    return fqa.QAdapterTrainer(
        model=tiny_base("llama", tie_word_embeddings=task.tied),
        args=args,
        train_dataset=word_rows(task.rows),
        eval_dataset=word_rows(5, seed=9),
        processing_class=TOKENIZER,
        callbacks=[DiesAfter(task.dies_after)] if task.dies_after and is_last else None,
        qadapter_config=fqa.QAdapterConfig(kv_mode=task.kv_mode, beta=0.1),
    )


def train(trainer: fqa.QAdapterTrainer, resume: bool) -> Any:
    """Weights of the adapter after it, how far they moved, the logged losses, and an evaluation."""
    before = weights(trainer)
    trainer.train(resume_from_checkpoint=resume or None)
    after = weights(trainer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"weights": after.tolist(), "moved": (after - before).tolist(), "losses": losses}
    return {**found, "evaluation": metrics(trainer)}


def evaluate(trainer: fqa.QAdapterTrainer) -> Any:
    torch.manual_seed(3)
    for parameter in lora_parameters(trainer.model).values():
        parameter.data.normal_(std=0.2)
    return metrics(trainer)


def metrics(trainer: fqa.QAdapterTrainer) -> dict[str, float]:
    return {name: value for name, value in trainer.evaluate().items() if "rewards" in name or "loss" in name}


def weights(trainer: fqa.QAdapterTrainer) -> torch.Tensor:
    return torch.cat([whole(parameter.detach()).flatten() for parameter in lora_parameters(trainer.model).values()])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
