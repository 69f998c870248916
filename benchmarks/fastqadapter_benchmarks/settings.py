"""What a run of the benchmarks is asked for, and the shapes it measures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

SMOLLM = "SmolLM2-135M-Instruct"
OURS = "fastqadapter"  # how every label of ours begins, and no other


def is_ours(label: str) -> bool:
    return label.startswith(OURS)


@dataclasses.dataclass(frozen=True)
class Head:
    """The size of an LM head."""

    size: int  # D
    vocab: int  # V
    softcap: float | None = None


# From the models' own config files.
HEADS = {
    "Qwen2.5-0.5B": Head(896, 151936),
    "Llama-3.2-1B": Head(2048, 128256),
    "Llama-3-8B": Head(4096, 128256),
    "Qwen2.5-7B": Head(3584, 152064),
    "Gemma-2-2B": Head(2304, 256000, softcap=30.0),
    "Gemma-3-4B": Head(2560, 262208),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run. Plain values, so that a child process can be handed it."""

    full: bool = False
    model: str = "demo"  # folder, hub id, a name of `workload.CONFIGS`, or "demo": the demo's SmolLM2
    data: str = "demo"  # file of preference pairs, or "demo": the demo's
    device: str = "cpu"
    threads: int = 2
    rounds: int = 5
    peers: tuple[str, ...] = ()  # only competitors with one of these in their label; none: all

    def asks_for(self, label: str) -> bool:
        """Whether a competitor of that name is to run."""
        return not self.peers or any(name.lower() in label.lower() for name in self.peers)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def our_backend(self) -> str:
        """The backend that `auto` takes on this device."""
        from fastqadapter import ops

        order = ("triton", "torch") if self.on_gpu else ("cpu", "torch")
        return next(name for name in order if ops.backends()[name] is None)

    @property
    def heads(self) -> dict[str, int]:
        """Heads that the loss is measured on, with the number of state rows: the model's own, then those of `HEADS`."""
        if self.on_gpu:
            names = HEADS if self.full else ("Llama-3-8B", "Qwen2.5-7B", "Gemma-2-2B", "Gemma-3-4B")
            return {self.model: 4096, **dict.fromkeys(names, 4096)}
        return {self.model: 1024, "Qwen2.5-0.5B": 512, "Llama-3.2-1B": 512} if self.full else {self.model: 256}

    @property
    def models(self) -> tuple[str, ...]:
        """Models that steps and decoding are measured on; those of 2 to 8 billion parameters have random weights."""
        if self.model != "demo" or not self.on_gpu:
            return (self.model,)
        return ("demo", "Llama-3-8B", "Qwen2.5-7B", "Gemma-2-2B")

    @property
    def pairs_in_step(self) -> int:
        return 4 if self.full else 2

    @property
    def decoding(self) -> tuple[tuple[int, int], ...]:
        """Batch sizes and prompt lengths that decoding is measured on."""
        return ((1, 80), (8, 80), (1, 1000)) if self.full else ((1, 64), (4, 32))

    @property
    def growth(self) -> dict[str, tuple[int, ...]]:
        """What is doubled from point to point: state rows, head size, vocabulary, tokens of a branch, pairs, prompt."""
        if self.on_gpu:
            return {
                "N": (1024, 2048, 4096, 8192, 16384), "D": (512, 1024, 2048, 4096), "V": (16384, 32768, 65536, 131072),
                "context": (256, 512, 1024, 2048), "pairs": (1, 2, 4, 8, 16),
                "decoded context": (512, 1024, 2048, 4096, 8192),
            }  # fmt: skip
        return {
            "N": (128, 256, 512, 1024, 2048), "D": (256, 512, 1024, 2048), "V": (8192, 16384, 32768, 65536, 131072),
            "context": (64, 128, 256, 512), "pairs": (1, 2, 4, 8), "decoded context": (128, 256, 512, 1024, 2048),
        }  # fmt: skip

    @property
    def growth_shape(self) -> dict[str, int]:
        """The sizes that are not doubled."""
        return {"N": 4096, "D": 2048, "V": 65536} if self.on_gpu else {"N": 512, "D": 576, "V": 49152}

    @property
    def new_tokens(self) -> int:
        return 24 if self.full else 6

    @property
    def max_length(self) -> int:
        """Longest prompt + response in tokens."""
        return 512 if self.full else 128


SETTINGS = pytest.StashKey[Settings]()  # where pytest's configuration keeps them


def name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
