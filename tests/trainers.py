"""A trainer of a tiny model on a few rows of words."""

from __future__ import annotations

from pathlib import Path

import torch

import fastqadapter as fqa
from tiny import lora_parameters, tiny_base
from words import word_rows, word_tokenizer

TOKENIZER = word_tokenizer()


def arguments(folder: Path, **settings) -> fqa.QAdapterTrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
    }
    return fqa.QAdapterTrainingArguments(**{**defaults, **settings})


def make_trainer(folder: Path, rows=None, eval_dataset=None, *, config=None, callbacks=None, **settings):
    torch.manual_seed(0)
    return fqa.QAdapterTrainer(
        model=tiny_base("llama"),
        args=arguments(folder, **settings),
        train_dataset=word_rows(6) if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
        callbacks=callbacks,
        qadapter_config=config or fqa.QAdapterConfig(kv_mode="separate", beta=0.1),
    )


def adapter_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lora_parameters(trainer.model).items()}
