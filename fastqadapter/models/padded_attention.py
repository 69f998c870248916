"""Attention over packed segments in one call a layer: their rows are gathered into a batch, padded to one length.

For GPUs, where a call for each segment costs a dozen launches: 4 pairs on SmolLM2-135M are 8 segments, in 30 layers and
two streams. A step of 788 tokens took 248 ms on an H200 that way (`separate`: 1362 ms, and why so much more was not
profiled). Only attention sees the padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastqadapter.models.scores import ScoreRule, explicit_attention

# Scores of the heads that share a K/V head, in all segments together: the mask has as many numbers. Beyond it, as for
# 16 pairs of 1024 tokens, segments go one by one.
MOST_SCORES = 2**24
ALIGNED = 8  # keys: rows of the mask start at 16 bytes

# Flash attention takes no mask. cuDNN would build a plan for every new shape, which is one for every micro-batch.
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Query rows and key rows of a segment, as Python ranges over their axes.
Rows = tuple[range, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class PaddedSegments:
    """N segments as a batch. Padding stands behind the rows of a segment; its indices are spread over all rows, since
    the zeros of its gradient are added there one by one."""

    shape: tuple[int, int, int]  # N, L_q, L_k
    queries: Tensor  # (N * L_q,) int64, row of each slot
    keys: Tensor  # (N * L_k,) int64
    slots: Tensor  # (T_q,) int64, slot of each query row
    query_counts: Tensor  # (N,)
    key_counts: Tensor  # (N,)

    @classmethod
    def build(cls, segments: Sequence[Rows], query_rows: int, key_rows: int, device: torch.device) -> PaddedSegments:
        """From segments that cover the query rows, each once, and see some of the key rows."""
        longest_q = max(len(queries) for queries, _ in segments)
        longest_k = -(-max(len(keys) for _, keys in segments) // ALIGNED) * ALIGNED
        slots = [0] * query_rows
        q_index: list[int] = []
        k_index: list[int] = []
        for number, (queries, keys) in enumerate(segments):
            for place, row in enumerate(queries):
                slots[row] = number * longest_q + place
            q_index += [*queries, *((len(q_index) + pad) % query_rows for pad in range(len(queries), longest_q))]
            k_index += [*keys, *((len(k_index) + pad) % key_rows for pad in range(len(keys), longest_k))]
        counts = ([len(rows) for rows, _ in segments], [len(keys) for _, keys in segments])
        tensors = (torch.tensor(each).to(device, non_blocking=True) for each in (q_index, k_index, slots, *counts))
        return cls((len(segments), longest_q, longest_k), *tensors)

    def mask(self, window: int | None) -> Tensor:
        """(N, 1, L_q, L_k) bool, true where seen: the last query of a segment sees all its keys, the one before it all
        but the last, ...; queries that are padding see what they like, but something."""
        _, longest_q, longest_k = self.shape
        device = self.keys.device
        places = torch.arange(longest_q, device=device) + (self.key_counts - self.query_counts)[:, None]  # (N, L_q)
        places = torch.minimum(places, self.key_counts[:, None] - 1)
        distance = places[:, :, None] - torch.arange(longest_k, device=device)
        seen = distance >= 0
        return (seen if window is None else seen & (distance < window))[:, None]


def attention_mask(padded: PaddedSegments, query: Tensor, keys: Tensor, rule: ScoreRule) -> Tensor:
    """The mask that `padded_attention` takes: (N, 1, L_q, L_k) bool; where the rule is plain, 0 and -inf in the dtype
    of `query`, for the longer sequences of `_grouped_sdpa`."""
    seen = padded.mask(rule.window)
    if not rule.is_plain:
        return seen
    additive = torch.zeros(seen.shape, dtype=query.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return additive.repeat(1, 1, query.shape[1] // keys.shape[1], 1)


def scores_of(segments: Sequence[tuple[int, int]]) -> int:
    """Scores of a head, padding included, from the numbers of query and of key rows of each segment."""
    return len(segments) * max(queries for queries, _ in segments) * max(keys for _, keys in segments)


def padded_attention(
    query: Tensor,  # (1, Hq, T_q, Dh)
    keys: Tensor,  # (1, Hkv, T_k, Dh)
    values: Tensor,  # (1, Hkv, T_k, Dv)
    padded: PaddedSegments,
    mask: Tensor,  # as `attention_mask` gives it
    rule: ScoreRule,
) -> Tensor:  # (1, Hq, T_q, Dv)
    """Attention of all segments."""
    count, longest_q, longest_k = padded.shape
    q = _gather(query, padded.queries, count, longest_q)  # (N, Hq, L_q, Dh)
    k, v = (_gather(each, padded.keys, count, longest_k) for each in (keys, values))
    if rule.is_plain:
        output = _grouped_sdpa(q, k, v, mask, rule.scaling)
    elif torch.is_grad_enabled() and query.requires_grad:
        # Explicit scores are quadratic: form them again in the backward pass.
        output = checkpoint(_explicit, q, k, v, mask, rule, use_reentrant=False, preserve_rng_state=False)
    else:
        output = _explicit(q, k, v, mask, rule)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, padded.slots).transpose(0, 1)[None]


def _gather(rows: Tensor, index: Tensor, count: int, longest: int) -> Tensor:
    """(1, H, T, D) -> (N, H, L, D)."""
    return rows[0].transpose(0, 1).index_select(0, index).unflatten(0, (count, longest)).transpose(1, 2)


def _grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:  # (N, Hq, L_q, Dv)
    """The queries of the heads that share a K/V head follow each other as if they were one longer sequence: kernels
    that take a mask take no grouped heads, and K/V need no copy for each."""
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    longer = q.unflatten(1, (kv_heads, group)).flatten(2, 3)
    with sdpa_kernel(BACKENDS):
        output = F.scaled_dot_product_attention(longer, k, v, attn_mask=mask, scale=scaling)
    return output.unflatten(2, (group, -1)).flatten(1, 2)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: ScoreRule) -> Tensor:
    return explicit_attention(q, k, v, mask, rule)[0]
