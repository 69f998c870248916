"""The model inputs of one forward, and their parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# transformers builds masks of four dimensions itself for a cache that can be compiled, one for each kind of layer.
Mask = Tensor | dict[str, Tensor] | None


@dataclasses.dataclass(frozen=True)
class Step:
    """Inputs of one forward, all for the same L tokens."""

    tokens: Tensor  # (B, L) ids or (B, L, D) embeddings
    attention_mask: Mask  # (B, past + L), or (B, 1, L, T)
    position_ids: Tensor  # (B, L)

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def has_plain_mask(self) -> bool:
        """Whether the mask says no more than which tokens are padding."""
        return self.attention_mask is None or (
            isinstance(self.attention_mask, Tensor) and self.attention_mask.dim() == 2
        )

    def last(self, rows: int) -> Step:
        """The last tokens; those before them are in the cache by now."""
        mask = _each(self.attention_mask, lambda mask: mask if mask.dim() == 2 else mask[:, :, -rows:])
        return Step(self.tokens[:, -rows:], mask, self.position_ids[:, -rows:])

    def but_last(self, rows: int) -> Step:
        """All but the last tokens."""
        mask = _each(
            self.attention_mask, lambda mask: mask[:, :-rows] if mask.dim() == 2 else mask[:, :, :-rows, :-rows]
        )
        return Step(self.tokens[:, :-rows], mask, self.position_ids[:, :-rows])

    def repeat(self, streams: int) -> Step:
        """The same tokens for each stream, stream after stream. Masks of four dimensions are for all streams."""
        if streams == 1:
            return self

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.repeat(streams, *[1] * (tensor.dim() - 1))

        mask = _each(self.attention_mask, lambda mask: repeated(mask) if mask.dim() == 2 else mask)
        return Step(repeated(self.tokens), mask, repeated(self.position_ids))

    def with_tail(self, rows: int) -> Step:
        """The last token `rows` times more behind the others, at its own position."""

        def extended(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, *[tensor[:, -1:]] * rows], dim=1)

        return Step(extended(self.tokens), _each(self.attention_mask, extended), extended(self.position_ids))

    def decoder_inputs(self) -> dict[str, Any]:
        """Arguments of a decoder's forward."""
        name = "inputs_embeds" if self.tokens.is_floating_point() else "input_ids"
        return {name: self.tokens, "attention_mask": self.attention_mask, "position_ids": self.position_ids}


def check_prompt_end(step: Step, rows: int | None) -> None:
    """Raise a ValueError where nobody says, at the start in `prompt` mode, which token is the prompt's last: the first
    of the `rows` whose logits are asked for."""
    if rows is None and step.length > 1:
        raise ValueError(
            "kv_mode='prompt' gives logits from the last prompt token on: pass logits_to_keep=1 where the input is the "
            "prompt, 1 + k where k tokens of a response follow it; score responses with a packed batch; for negative "
            "prompts use another kv_mode"
        )


def check_response(step: Step, rows: int) -> None:
    """Raise a ValueError where more tokens come than logits are asked for, behind a prompt of `prompt` mode: these are
    no response but a further turn."""
    if rows < step.length:
        raise ValueError(
            f"kv_mode='prompt' cannot take {step.length} tokens after the prompt at once: where the prompt ends "
            "decides which K/V the adapter reads; start with a fresh cache"
        )


def _each(mask: Mask, change: Callable[[Tensor], Tensor]) -> Mask:
    """Apply `change` to the mask, or to each of several."""
    if isinstance(mask, dict):
        return {kind: None if each is None else change(each) for kind, each in mask.items()}
    return None if mask is None else change(mask)
