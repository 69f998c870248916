"""The weights of a saved adapter, as serving wants them. Does not need vLLM."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from fastqadapter.integrations.vllm.served import Served
from fastqadapter.models.loading import weight_errors

ADAPTERS = "adapters"  # in the served folder
PREFIX, SUFFIXES = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
Pair = tuple[Tensor, Tensor]  # A (r, D_in), B (D_out, r) times its scaling; fp32


def read_adapters(root: str | Path, served: Served) -> dict[str, dict[str, Pair]]:
    """Those of a served folder, by name and layer; raises what `read_adapter` does."""
    if not Path(root).is_dir():
        raise ValueError(f"{root} is no local folder: download the export first (`hf download`), then serve the folder")
    return {name: read_adapter(Path(root) / ADAPTERS / name) for name in served.names}


def read_adapter(folder: Path) -> dict[str, Pair]:
    """Name of the layer -> its weights.

    Plain LoRA of PEFT (https://huggingface.co/docs/peft): `y += scaling x A^T B^T`, in safetensors.

    Raises:
        ValueError: what the folder holds is not LoRA on linear layers alone, or not finite.
    """
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: {file} is missing")
    config = LoraConfig.from_pretrained(str(folder))
    for option, given in {"use_dora": config.use_dora, "bias": config.bias != "none"}.items():
        if given:
            raise ValueError(f"{folder}: {option}={getattr(config, option)!r}: vLLM is served plain LoRA alone")
    with weight_errors(folder):
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    pairs: dict[str, Pair] = {}
    for key in weights:
        name = key.removeprefix(PREFIX).removesuffix(SUFFIXES[0])
        if key.endswith(SUFFIXES[1]):
            continue
        if not key.endswith(SUFFIXES[0]):
            raise ValueError(f"{folder}: {key} is no LoRA weight of a linear layer")
        other = f"{PREFIX}{name}{SUFFIXES[1]}"
        if other not in weights:
            raise ValueError(f"{folder}: the weight file misses {other}")
        a, b = weights[key].float(), weights[other].float()
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{folder}: the weights of {name} are not finite; the run that made them diverged")
        rank = len(a)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        pairs[name] = a, b * (alpha / rank**0.5 if config.use_rslora else alpha / rank)
    if not pairs:
        raise ValueError(f"{folder}: no LoRA weights in {SAFETENSORS_WEIGHTS_NAME}")
    return pairs
