"""One process of `test_distributed.py`: trains one step or evaluates, and lets rank 0 write what came out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from test_trainer import adapter_weights, make_trainer
from tiny import lora_parameters
from words import word_rows


def main(task: str, folder: Path, batch_size: int, accumulate: int) -> None:
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    distributed: dict[str, str] = {}
    if processes > 1:
        distributed["ddp_backend"] = "gloo"
        dist.init_process_group("gloo", f"file://{folder.resolve()}/rendezvous", rank=rank, world_size=processes)
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = make_trainer(
        folder,
        word_rows(8),
        eval_dataset=word_rows(5, seed=9),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        **settings,
        **distributed,
    )
    before = adapter_weights(trainer)
    if task == "train":
        trainer.train()
        after = adapter_weights(trainer)
        found = torch.cat([(after[name] - before[name]).flatten() for name in before]).tolist()
    else:
        torch.manual_seed(3)
        for parameter in lora_parameters(trainer.model).values():
            parameter.data.normal_(std=0.2)
        found = {name: value for name, value in trainer.evaluate().items() if "rewards" in name or "loss" in name}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    if processes > 1:
        # What is tested is done. The end of a process with gloo's threads in it is torch's: one in some hundred ended
        # in an abort, one never.
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
