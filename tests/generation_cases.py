"""What the tests of generation share: models with trained adapters, prompts, and the policy combined by hand."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

import fastqadapter as fqa
from references import hand_policy, policy_logits
from tiny import ARCHITECTURES, MODES, PAD, Twins, make_twins, random_ids

CLOSE = {"atol": 2e-5, "rtol": 0.0}
NUMBERS = {"alpha_0": 0.4, "alpha_tilde": 1.3}
PROMPT = random_ids(9, seed=40)
PROMPTS = [PROMPT, random_ids(3, seed=41), random_ids(1, seed=42)]
each_mode = pytest.mark.parametrize("kv_mode", MODES)
each_name = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.lru_cache(maxsize=3)
def trained_twins(name: str, kv_mode: str) -> Twins:
    return make_twins(name, kv_mode, **NUMBERS)


@functools.lru_cache(maxsize=3)
def two_adapters(kv_mode: str) -> Twins:
    return make_twins("llama", kv_mode, adapters=("default", "polite"))


def ids_of(*rows: list[int]) -> dict[str, Tensor]:
    """Left-padded model inputs."""
    width = max(map(len, rows))
    padded = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def hand_logits(
    twins: Twins, ids: list[int], prompt_length: int, weights: Mapping[str, float] | None = None, **dials: Any
) -> Tensor:
    """Log-probabilities of the customised policy after `ids`, from scratch."""
    adapted = []
    for adapter, weight in (weights or {"default": 1.0}).items():
        adapted.append((weight, functools.partial(run_adapter, twins.adapted, adapter)))
    return policy_logits(twins.base, adapted, ids, prompt_length, twins.kv_mode, **{**NUMBERS, **dials})


def in_float64(base: PreTrainedModel) -> PreTrainedModel:
    """The same model in float64; torch's grouped products of experts have none."""
    exact = copy.deepcopy(base).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    return exact


def run_adapter(model: PeftModel, adapter: str, **inputs: Any) -> Any:
    model.set_adapter(adapter)
    return model(**inputs)


def by_hand(twins: Twins, prompt_width: int, **dials: Any) -> Any:
    """The hand-combined policy as a causal LM, for transformers' own search."""
    return hand_policy(twins.base, functools.partial(hand_logits, twins, **dials), prompt_width)


def generated(model: Any, *prompts: list[int], **kwargs: Any) -> list[list[int]]:
    """New tokens of each returned sequence."""
    inputs = ids_of(*prompts)
    sequences = model.generate(**inputs, **{"do_sample": False, "pad_token_id": PAD, **kwargs})
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def with_cache(model: fqa.QAdapterModel, ids: list[int], steps: int, **kwargs: Any) -> Any:
    inputs = torch.tensor([ids])
    return model.generate(
        inputs, max_new_tokens=steps, do_sample=False, pad_token_id=PAD, return_dict_in_generate=True, **kwargs
    )
