"""Tiny random causal LMs of many architectures, adapters with random weights on them, and token pairs to train on.

All weights are random, norms, biases and attention sinks too, and large enough that every part of a model shows in its
logits. Sliding windows are shorter than the sequences of `PAIRS`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import fastqadapter as fqa
from fastqadapter.packing import PackedPairs, pack_pairs

VOCABULARY = 97
PAD = 0
MODES = ("separate", "prompt", "shared")
Pair = tuple[list[int], list[int], list[int]]  # token ids of prompt, chosen, rejected

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING_FIRST = ["sliding_attention", "full_attention"] * 2
_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Name: (class prefix, settings beyond _SIZES, LoRA targets).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("Llama", {}, _LLAMA_TARGETS),  # grouped-query attention
    "qwen3": ("Qwen3", {"head_dim": 8}, _LLAMA_TARGETS),  # q and k norms
    "gemma2": (  # both soft-caps, low enough to bend; sliding layers
        "Gemma2",
        {
            "head_dim": 8,
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "layer_types": _SLIDING_FIRST,
            "attn_implementation": "eager",  # transformers 5.16 takes SDPA, which drops the soft-cap
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 16,
        },
        _LLAMA_TARGETS,
    ),
    "gemma3": (  # sliding layers with a rotary base of their own, q and k norms
        "Gemma3",
        {
            "head_dim": 8,
            "num_hidden_layers": 4,
            "sliding_window": 4,
            "layer_types": _SLIDING_FIRST,
            "tie_word_embeddings": False,
        },
        _LLAMA_TARGETS,
    ),
    "phi3": ("Phi3", {}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),  # fused projections
    "gpt_oss": (  # attention sinks, sliding layers, mixture of experts
        "GptOss",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        ("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 4}, _LLAMA_TARGETS),  # every layer slides
    "deepseek_v3": (  # the cache keeps K/V compressed; mixture of experts
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ),
    "cohere": ("Cohere", {"logit_scale": 0.25}, _LLAMA_TARGETS),  # scaled logits
    "granite": ("Granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5}, _LLAMA_TARGETS),  # divided logits
    "phi": ("Phi", {"num_key_value_heads": 4}, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),  # head bias
}
EXTRAS = ("cohere", "granite", "phi")
_CLASS_SUFFIX = {"Gemma3": "TextConfig"}


def tiny_base(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random causal LM of an architecture of `ARCHITECTURES`, in eval mode."""
    prefix, own_settings, _ = ARCHITECTURES[name]
    config_class = getattr(transformers, prefix + _CLASS_SUFFIX.get(prefix, "Config"))
    config = config_class(**{**_SIZES, **own_settings, **settings})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, biases, sinks: 0 or 1 until now
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.eos_token_id = None  # sequences as long as asked for, unless a test sets it
    return model.to(dtype).eval()


def lora_targets(name: str, kv_mode: str) -> list[str]:
    """All linear layers of the decoder that the mode allows."""
    keys_and_values = {"shared": ("k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "prompt": ("kv_b_proj",)}
    return [target for target in ARCHITECTURES[name][2] if target not in keys_and_values.get(kv_mode, ())]


def lora_config(name: str, kv_mode: str, **settings: Any) -> LoraConfig:
    """Rank 4, alpha 8, on all allowed linear layers."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": lora_targets(name, kv_mode), **settings}
    return LoraConfig(task_type="CAUSAL_LM", **settings)


@torch.no_grad()
def randomise_adapter(model: nn.Module, adapter: str = "default", seed: int = 7) -> None:
    """Random weights in A and B of an adapter: with PEFT's B = 0 an adapter is invisible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and "lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all adapters by name; PEFT's own model and ours name them alike."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def lora_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every LoRA weight by name, 0 where it has none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in lora_parameters(model).items()
    }


@dataclasses.dataclass
class Twins:
    """The model under test, and the same base and adapters as ordinary models that know nothing of fastqadapter."""

    model: fqa.QAdapterModel
    base: PreTrainedModel
    adapted: PeftModel  # with eager attention, as `base`

    @property
    def kv_mode(self) -> str:
        return self.model.qadapter_config.kv_mode


def make_twins(
    name: str,
    kv_mode: str,
    dtype: torch.dtype = torch.float32,
    *,
    adapters: Iterable[str] = ("default",),
    base_settings: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    trained: bool = True,
    **settings: Any,
) -> Twins:
    """Build the twins; `settings` are those of `QAdapterConfig`, `lora` those of `LoraConfig`.

    With `trained=False` the adapters stay as PEFT makes them: invisible.
    """
    base = tiny_base(name, dtype, **(base_settings or {}))
    base.set_attn_implementation("eager")
    plain, mine = copy.deepcopy(base), tiny_base(name, dtype, **(base_settings or {}))
    peft_config = lora_config(name, kv_mode, **(lora or {}))
    first, *others = adapters
    adapted = get_peft_model(plain, peft_config, adapter_name=first)
    config = fqa.QAdapterConfig(kv_mode=kv_mode, **settings)
    model = fqa.get_qadapter_model(mine, config, peft_config, first)
    for adapter in others:
        adapted.add_adapter(adapter, peft_config)
        model.add_adapter(adapter, peft_config)
    for seed, adapter in enumerate((first, *others)):
        if trained:
            randomise_adapter(adapted, adapter, seed + 7)
    for each in (adapted, model):
        each.to(dtype)
    with torch.no_grad():
        ours = lora_parameters(model)
        for parameter_name, parameter in lora_parameters(adapted).items():
            ours[parameter_name].copy_(parameter)
    return Twins(model.eval(), base, adapted.eval())


def random_ids(length: int, seed: int) -> list[int]:
    """Random token ids, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def random_pair(prompt: int, chosen: int, rejected: int, seed: int = 0) -> Pair:
    """A random pair of the given lengths."""
    return random_ids(prompt, 3 * seed), random_ids(chosen, 3 * seed + 1), random_ids(rejected, 3 * seed + 2)


# Very different lengths, prompts and responses of one token, sequences longer than every sliding window.
PAIRS: tuple[Pair, ...] = (
    random_pair(9, 11, 2, seed=1),
    random_pair(1, 1, 7, seed=2),
    random_pair(5, 4, 1, seed=3),
    random_pair(1, 1, 1, seed=4),
)


def packed(pairs: Iterable[Pair], model: fqa.QAdapterModel) -> PackedPairs:
    """The pairs as the model's preset wants them."""
    shifted = model.qadapter_config.scored_states == "shifted"
    return pack_pairs(list(pairs), pad_action=PAD if shifted else None)


def loss_and_gradients(model: fqa.QAdapterModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of `PAIRS` and the gradient of every LoRA weight, on the device of the model."""
    model.zero_grad()
    loss = model(packed(PAIRS, model).to(model.device)).loss
    loss.backward()
    return loss.detach(), lora_gradients(model)
