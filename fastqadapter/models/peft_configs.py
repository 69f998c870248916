"""Which PEFT configs the method allows: LoRA that leaves the frozen base as it is."""

from __future__ import annotations

import copy

from peft import PeftConfig, PeftType, TaskType
from transformers import PreTrainedModel

from fastqadapter.config import KVMode
from fastqadapter.models import base

# Initialisations that rewrite the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) are not among these.
BASE_PRESERVING_INITS = (True, False, "gaussian", "orthogonal", "eva")


def checked_peft_config(model: PreTrainedModel, peft_config: PeftConfig, kv_mode: KVMode) -> PeftConfig:
    """A copy of the user's config with our default targets, or a ValueError if it would change the base."""
    if peft_config.peft_type != PeftType.LORA:
        raise ValueError(f"peft_type={peft_config.peft_type!s} is not supported; use a LoraConfig")
    peft_config = copy.deepcopy(peft_config)
    if peft_config.init_lora_weights not in BASE_PRESERVING_INITS:
        raise ValueError(
            f"init_lora_weights={peft_config.init_lora_weights!r} rewrites the base weights, which must stay frozen; "
            f"use one of {', '.join(map(repr, BASE_PRESERVING_INITS))}"
        )
    for name in ("layer_replication", "alora_invocation_tokens"):
        if getattr(peft_config, name, None):
            raise ValueError(f"{name} is not supported: it changes the base stream; leave it out")
    for name in ("modules_to_save", "trainable_token_indices", "bias"):
        value = getattr(peft_config, name, None)
        if value and value != "none":
            raise ValueError(f"{name}={value!r}: weights of the frozen base would be trained; leave {name} out")
    if peft_config.target_modules is None and not getattr(peft_config, "target_parameters", None):
        peft_config.target_modules = base.default_targets(model, kv_mode)
    if peft_config.task_type is None:
        peft_config.task_type = TaskType.CAUSAL_LM
    return peft_config
