"""How a layer turns queries and keys into weights: scale, window, soft-cap (Gemma-2), a sink per head (GPT-OSS)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastqadapter.ops.checks import accumulation_dtype


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """`weights = softmax(cap(scaling q k^T))` over the keys in sight, with `cap(s) = softcap tanh(s / softcap)`; a sink
    is one more score of each head, without a value."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # (Hq,)

    @property
    def is_plain(self) -> bool:
        """Whether SDPA can do it."""
        return self.softcap is None and self.sinks is None


def bottom_right_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last query sees all keys, the one before it all but the last, ...; with a window, none
    but the last `window` of these."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def explicit_attention(
    query: Tensor,  # (B, Hq, L, Dh)
    key: Tensor,  # (B, Hkv, T, Dh)
    value: Tensor,  # (B, Hkv, T, Dv)
    mask: Tensor | None,  # bool, broadcasts to (B, Hq, L, T); None: all keys are in sight
    rule: ScoreRule,
) -> tuple[Tensor, Tensor]:
    """Attention by its formula, for what SDPA does not offer.

    Returns:
        Output (B, Hq, L, Dv) in the dtype of `value`, and the log of the sum of the exponentiated scores, sink
        included, (B, Hq, L), in fp32 at least. Where no key is in sight the output is 0, and the lse that of the sink
        or -inf.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))  # (B, Hkv, g, L, Dh)
    scores = (grouped @ key.unsqueeze(2).transpose(-1, -2) * rule.scaling).flatten(1, 2)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.to(accumulation_dtype(scores.dtype))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    largest = scores.amax(dim=-1, keepdim=True)
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype)[:, None, None]
        largest = torch.maximum(largest, sinks)
    # Of the scores less their largest, not less their lse, whose rounding would be that of every weight. Where no key
    # is in sight, -inf less -inf would be NaN.
    weights = (scores - largest.masked_fill(largest == -torch.inf, 0.0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    if rule.sinks is not None:
        total = total + (sinks - largest).exp()
    lse = (largest + total.log()).squeeze(-1)
    weights = (weights / total.masked_fill(total == 0.0, 1.0)).to(value.dtype)
    return (weights.unflatten(1, (kv_heads, -1)) @ value.unsqueeze(2)).flatten(1, 2), lse
