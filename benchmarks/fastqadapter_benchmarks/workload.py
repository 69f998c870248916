"""What the competitors work on: real pairs, real hidden states, models; made once and shared."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

import fastqadapter as fqa
from fastqadapter.data import read_rows, tokenize_rows
from fastqadapter.demo.smollm import demo_model_folder
from fastqadapter.loss import LMHead
from fastqadapter.models.base import lm_head_of
from fastqadapter_benchmarks.settings import SMOLLM, Settings

Row = dict[str, Any]  # a tokenised pair: prompt_ids, chosen_ids, rejected_ids
RANK = 8

# Shapes of models that have no weights here, from their config files; the weights are random, and speed is the same.
CONFIGS: dict[str, PreTrainedConfig] = {
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
    ),
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, rope_theta=1000000.0, tie_word_embeddings=False,
    ),
    "Gemma-2-2B": Gemma2Config(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
    ),
}  # fmt: skip


def title_of(model: str) -> str:
    """A model's name as a table has it."""
    return {"demo": SMOLLM}.get(model, f"{model}, random weights" if model in CONFIGS else Path(model).name)


def folder_of(model: str) -> str:
    """The folder or hub id of a model with weights; of the demo's for one without, which lends its tokenizer."""
    return str(demo_model_folder()) if model == "demo" or model in CONFIGS else model


@functools.cache
def tokenizer(model: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder_of(model))


@functools.lru_cache(maxsize=2)
def _base(model: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    if model in CONFIGS:
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(CONFIGS[model], dtype=dtype).eval()
    return AutoModelForCausalLM.from_pretrained(folder_of(model), dtype=dtype).to(device).eval()


def load_base(model: str, device: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A base model for an adapter of its own; all of one name, device and dtype have the same weights in memory."""
    base = _base(model, device, dtype)
    shared = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in shared})


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", **options)


def raw_rows(data: str) -> list[Row]:
    """Preference rows as read, from a file or the demo's own."""
    if data == "demo":
        from fastqadapter.demo.preference import preference_pairs

        return preference_pairs()[0]
    return list(read_rows(data))


@functools.cache
def _tokenized(model: str, data: str, max_length: int) -> list[Row]:
    return list(tokenize_rows(raw_rows(data), tokenizer(model), max_length=max_length, progress=False))


def pairs(settings: Settings, count: int | None = None, model: str | None = None) -> list[Row]:
    """The first pairs of the data, or all of them, tokenised for the model (default: the settings' own).

    Raises:
        ValueError: there are fewer.
    """
    rows = _tokenized(model or settings.model, settings.data, settings.max_length)
    if len(rows) < (count or 1):
        found = f"data={settings.data!r} has {len(rows)} pairs of at most {settings.max_length} tokens"
        raise ValueError(f"{found}; this suite needs {count or 1}")
    return rows[:count]


def check_inputs(settings: Settings, steps: bool) -> None:
    """Load what all suites need but the weights; `steps`: as many pairs as a training step in every round needs.

    Raises:
        ValueError: no causal language model with a tokenizer, or data that is none or not enough.
    """
    if settings.model != "demo":
        config = AutoConfig.from_pretrained(settings.model)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"--model {settings.model}: {config.model_type} is no causal language model")
    pairs(settings, settings.pairs_in_step * settings.rounds if steps else 1)


def micro_batches(settings: Settings, size: int, model: str | None = None) -> list[list[Row]]:
    """One micro-batch for each round."""
    rows = pairs(settings, size * settings.rounds, model)
    return [rows[size * i : size * (i + 1)] for i in range(settings.rounds)]


def batch_of_states(settings: Settings, states: int) -> fqa.PackedPairs:
    """The first pairs of the data that have at least so many state rows, all pairs over again if they are too few."""
    chosen: list[Row] = []
    found = 0
    rows = itertools.cycle(pairs(settings))
    while found < states:
        chosen.append(row := next(rows))
        found += len(row["chosen_ids"]) + len(row["rejected_ids"]) - 1
    return fqa.PreferenceCollator(None, None)(chosen)


def vocab_size(model: str) -> int:
    config = CONFIGS.get(model) or AutoConfig.from_pretrained(folder_of(model)).get_text_config()
    return config.vocab_size


def random_ids(vocab: int, *shape: int) -> Tensor:
    """Token ids from the middle of the vocabulary, where no special tokens are."""
    return torch.randint(vocab // 50, vocab * 4 // 5, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def real_hidden_states(settings: Settings, batch: fqa.PackedPairs) -> tuple[Tensor, Tensor, LMHead]:
    """`h_q`, `h_b` (S, D) of the settings' model, with a random adapter, in bf16, and its head."""
    torch.manual_seed(0)
    base = load_base(settings.model, settings.device)
    model = fqa.get_qadapter_model(base, fqa.QAdapterConfig(kv_mode="shared"), lora(init_lora_weights=False))
    hidden_q, hidden_b = model.eval().hidden_states(batch.to(settings.device))
    return hidden_q, hidden_b, lm_head_of(base)
