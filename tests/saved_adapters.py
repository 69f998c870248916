"""Trained adapters in folders, and what a model computes, for the tests of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import fastqadapter as fqa
from tiny import (
    PAD,
    PAIRS,
    make_twins,
    packed,
    random_ids,
)

NUMBERS = {"alpha_0": 0.7, "alpha_tilde": 1.3, "gamma": 0.9, "beta": 0.1}
PROMPT = torch.tensor([random_ids(9, seed=50)])


def trained(kv_mode: str = "shared", name: str = "llama", **settings: Any) -> fqa.QAdapterModel:
    return make_twins(name, kv_mode, **{**NUMBERS, **settings}).model


def saved(folder: Path, kv_mode: str = "shared", name: str = "llama", **settings: Any) -> Path:
    """A folder with a trained adapter."""
    trained(kv_mode, name, **settings).save_pretrained(folder)
    return folder


@torch.no_grad()
def fingerprint_of_function(model: fqa.QAdapterModel) -> dict[str, Tensor]:
    """What a model computes: policy logits, generated tokens, loss."""
    return {
        "logits": model(input_ids=PROMPT, logits_to_keep=1).logits,
        "tokens": model.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=PAD),
        "loss": model(packed(PAIRS, model)).loss[None],
    }


def assert_same_function(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def adapter_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
