"""What the tests of serving share: small models of several architectures, adapters, and what generate says to them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

import fastqadapter as fqa
from fastqadapter.demo.smollm import demo_model_folder
from fastqadapter.integrations.vllm.export import export_for_vllm
from fastqadapter.models import QAdapterModel
from tiny import lora_targets, tiny_base
from words import word_tokenizer

ADAPTERS = ("polite", "brief")


def save_tiny(folder: Path, architecture: str, **overrides: Any) -> Path:
    """Heads of 32, which vLLM's attention on a CPU wants."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= overrides
    model = tiny_base(architecture, **sizes, head_dim=32, max_position_embeddings=512)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_adapters(
    base: Path,
    folder: Path,
    kv_mode: str,
    architecture: str = "llama",
    std: float = 0.05,
    targets: list[str] | None = None,
) -> dict[str, Path]:
    """Two adapters with random weights, of different ranks."""
    saved = {}
    for seed, name in enumerate(ADAPTERS):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = fqa.QAdapterConfig(kv_mode=kv_mode, alpha_0=1.0 - 0.2 * seed, alpha_tilde=1.0 + 0.5 * seed)
        lora = LoraConfig(r=8 - 4 * seed, lora_alpha=16, target_modules=targets or lora_targets(architecture, kv_mode))
        wrapped = fqa.get_qadapter_model(model, config, lora)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in wrapped.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(folder / name)
        saved[name] = folder / name
    return saved


def load_all(base: Path, adapters: dict[str, Path]) -> QAdapterModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    [first, *others] = adapters
    wrapped = QAdapterModel.from_pretrained(model, adapters[first], adapter_name=first)
    for name in others:
        wrapped.load_adapter(adapters[name], name)
    return wrapped.eval()


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of one request: its tokens, and the log-probability of each."""

    tokens: list[int]
    log_probs: list[float]


@torch.no_grad()
def generated(model: QAdapterModel, prompt: list[int], tokens: int, extra: dict[str, Any]) -> Answer:
    """Greedy, by transformers' generate on the customised policy."""
    given = dict(extra)
    if isinstance(given.get("adapters"), str):
        name, _, weight = given["adapters"].partition("=")
        given["adapters"] = {name: float(weight or 1.0)}
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, **given,
    )  # fmt: skip
    new = output.sequences[0, len(prompt) :].tolist()
    rows = [logits[0].double().log_softmax(dim=-1) for logits in output.logits]
    return Answer(new, [float(row[token]) for row, token in zip(rows, new, strict=True)])


def main() -> None:
    """`python tests/serving.py FOLDER`: SmolLM2 with two random adapters, exported to FOLDER/served."""
    folder = Path(sys.argv[1])
    base = demo_model_folder()
    export_for_vllm(base, save_adapters(base, folder / "trained", "shared", std=0.02), folder / "served")


if __name__ == "__main__":
    main()
