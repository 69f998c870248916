"""What `--model_args` may say: adapters and dials, and those arguments of lm-eval's `hf` that go with a Q-Adapter."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from fastqadapter.commands.adapters import name_adapters
from fastqadapter.commands.parsing import ArgumentError

OPEN_EXPONENT = re.compile(r"=-?[0-9.]+[eE]$")  # of a weight like 1e+2, whose + is not between two adapters
# Of lm-eval's `hf`: why not, and what to do instead.
REFUSED = {
    "peft": "is for plain PEFT adapters: give adapter=FOLDER",
    "delta": "would change the base that the adapter was trained on: leave it out",
    "autogptq": "loads no model of transformers: quantise the base with transformers, or leave it out",
    "gptqmodel": "loads no model of transformers: quantise the base with transformers, or leave it out",
    "gguf": "is no model of transformers: give pretrained=FOLDER with safetensors",
    "gguf_file": "is not the base that an adapter knows: give pretrained=FOLDER with safetensors",
    "parallelize": "splits the base over devices, untested with two streams: use `accelerate launch`, or one device",
    "tp_plan": "splits layers over devices, untested with two streams: use `accelerate launch`, or one device",
    "max_memory_per_gpu": "goes with parallelize: leave it out",
    "max_cpu_memory": "goes with parallelize: leave it out",
    "offload_folder": "goes with parallelize: leave it out",
    "backend": "is causal always: leave it out",
    "softmax_dtype": "is float32 always: leave it out",
    "mixed_precision_dtype": "would round the two streams apart: choose dtype, or leave it out",
}
OF_THE_MODEL = ("attn_implementation",)  # what `hf` hands on to transformers' from_pretrained, as far as we know of it


def check_hf_arguments(given: Mapping[str, Any]) -> None:
    """Raise an ArgumentError for an argument that lm-eval's `hf` does not have, or that a Q-Adapter cannot."""
    for name, value in given.items():
        if name in REFUSED and value not in (None, False):
            raise ArgumentError(f"{name}={value!r} {REFUSED[name]}")
    own = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    known = (own | set(OF_THE_MODEL)) - set(REFUSED)
    unknown = sorted(set(given) - known - set(REFUSED))
    if unknown:
        names = dict.fromkeys(["adapter", "alpha_0", "alpha_tilde", "weight", "force", *sorted(known)])
        raise ArgumentError(f"unknown arguments {unknown}; known are {', '.join(names)}")


def adapters_of(adapter: str | Sequence[str] | None, weight: float | None) -> tuple[dict[str, str], dict[str, float]]:
    """Folders and weights by name, of `FOLDER`, or `FOLDER=WEIGHT+FOLDER=WEIGHT`; `weight` is that of a single one.

    Raises:
        ArgumentError: no adapter, or a weight given twice.
    """
    each = [] if adapter is None else list(_split(adapter))
    if not each:
        raise ArgumentError("adapter is missing: give adapter=FOLDER, the folder or hub id of a trained Q-Adapter")
    folders, weights = name_adapters(each)
    if weight is not None:
        if len(folders) > 1:
            raise ArgumentError(
                f"weight={weight:g} is for one adapter, and there are {len(folders)}: write adapter=FOLDER=WEIGHT+..."
            )
        [(name, before)] = weights.items()
        if before not in (1.0, weight):
            raise ArgumentError(f"weight={weight:g} and adapter={adapter!r} differ: give the weight once")
        weights = {name: weight}
    return folders, weights


def _split(adapter: str | Sequence[str]) -> Iterable[str]:
    """The adapters of `A+B`, unless that is a folder."""
    if isinstance(adapter, (list, tuple)):
        return map(str, adapter)
    text = str(adapter)  # lm-eval makes a number of what looks like one
    if text and Path(text).exists():
        return [text]
    parts: list[str] = []
    for piece in text.split("+"):
        if parts and OPEN_EXPONENT.search(parts[-1]):
            parts[-1] += f"+{piece}"
        else:
            parts.append(piece)
    return filter(None, parts)


def number(name: str, value: Any) -> float | None:
    """What lm-eval's parser made of a dial.

    Raises:
        ArgumentError: it is no number.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name}={value!r} is no number") from None
