"""Attention over packed rows: a list of segments, each some query rows that see some key rows, bottom-right causal.

Registered with transformers' attention interface under the name `fqa_packed`; the modelling files stay as they are.
The K/V of the base pass are recorded here, after rotary embedding and norms, and read here by the Q pass, so neither
pass needs a cache object and gradient checkpointing works.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fastqadapter.config import KVMode
from fastqadapter.models.cpu_attention import CpuAttentionFunction, rows_of
from fastqadapter.models.padded_attention import (
    MOST_SCORES,
    PaddedSegments,
    attention_mask,
    padded_attention,
    scores_of,
)
from fastqadapter.models.scores import ScoreRule, bottom_right_mask, explicit_attention
from fastqadapter.packing import PackedPairs

NAME = "fqa_packed"
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Query rows and the key rows they see; the last query sees all keys, the one before it all but the last, ..."""

    queries: slice
    keys: tuple[slice, ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of query rows and of key rows."""
        return self.queries.stop - self.queries.start, sum(part.stop - part.start for part in self.keys)

    @property
    def key_rows(self) -> list[int]:
        return [row for part in self.keys for row in range(part.start, part.stop)]

    def is_causal_square(self, window: int | None) -> bool:
        """Whether plain causal attention without a mask does it."""
        queries, keys = self.sizes
        return queries == keys and (window is None or window >= keys)


class PackedAttention:
    """What the attention function needs in one pass: the segments, and which K/V the pass writes or reads.

    The K/V axis of a pass is that of its own rows ("own"), that of the recorded base rows ("base"), or the recorded
    base rows followed by the own rows ("base+own").
    """

    def __init__(
        self,
        segments: list[Segment],
        kv_axis: str,
        recorded: dict[int, tuple[Tensor, Tensor]] | None = None,
        first_read: int = 0,
    ):
        self.segments = segments
        self.kv_axis = kv_axis
        self.recorded = recorded
        self.first_read = first_read  # K/V of the layers below are not recorded: nobody reads them
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}
        self._additive: dict[tuple[int, int, int | None], Tensor] = {}
        self._padded: PaddedSegments | None = None
        self._padded_masks: dict[tuple[int | None, bool, int, torch.dtype], Tensor] = {}

    def keys_and_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(1, Hkv, T_kv, Dh) keys and values on the K/V axis of this pass."""
        if self.kv_axis == "own":
            if self.recorded is not None and layer >= self.first_read:
                if layer in self.recorded:
                    raise ValueError(f"layer {layer} attends twice, which kv_mode='prompt' and 'shared' cannot serve")
                self.recorded[layer] = (key, value)
            return key, value
        assert self.recorded is not None
        base_key, base_value = self.recorded[layer]
        if self.kv_axis == "base":
            return base_key, base_value
        return torch.cat([base_key, key], dim=2), torch.cat([base_value, value], dim=2)

    def mask(self, segment: Segment, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool, true where seen; built once a pass, not once a layer."""
        queries, keys = segment.sizes
        key = (queries, keys, window, device)
        if key not in self._masks:
            self._masks[key] = bottom_right_mask(queries, keys, window, device)
        return self._masks[key]

    def padded(self, query: Tensor, keys: Tensor) -> PaddedSegments:
        """The segments as a batch; built once a pass."""
        if self._padded is None:
            rows = [(range(each.queries.start, each.queries.stop), each.key_rows) for each in self.segments]
            self._padded = PaddedSegments.build(rows, query.shape[2], keys.shape[2], query.device)
        return self._padded

    def padded_mask(self, padded: PaddedSegments, query: Tensor, keys: Tensor, rule: ScoreRule) -> Tensor:
        """Their mask; built once a pass for each kind of layer."""
        key = (rule.window, rule.is_plain, query.shape[1] // keys.shape[1], query.dtype)
        if key not in self._padded_masks:
            self._padded_masks[key] = attention_mask(padded, query, keys, rule)
        return self._padded_masks[key]

    def additive_mask(self, segment: Segment, window: int | None) -> Tensor | None:
        """The same as 0 and -inf in fp32 on the CPU; None where the segment is square and causal."""
        if segment.is_causal_square(window):
            return None
        key = (*segment.sizes, window)
        if key not in self._additive:
            seen = self.mask(segment, window, torch.device("cpu"))
            self._additive[key] = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return self._additive[key]


def base_segments(batch: PackedPairs) -> list[Segment]:
    """Segments of a pass over all token rows on its own K/V: prompt with the first response, then each further
    response with the prompt. No branch sees another."""
    segments = []
    for group in batch.layout:
        first = slice(group.prompt.start, group.branches[0].stop)
        segments.append(Segment(first, (first,)))
        segments.extend(Segment(branch, (group.prompt, branch)) for branch in group.branches[1:])
    return [segment for segment in segments if segment.sizes[0]]


def q_segments(batch: PackedPairs, kv_mode: KVMode) -> list[Segment]:
    """Segments of the Q pass over the state rows: in `shared` mode on the base K/V, in `prompt` mode on the base K/V
    of the prompt but its last token, and from that token on on its own ("base+own" axis)."""
    tokens = batch.input_ids.shape[0]

    def own(rows: slice) -> slice:
        return slice(tokens + rows.start, tokens + rows.stop)

    segments = []
    for group in batch.layout:
        last_prompt = slice(group.first_state, group.first_state + 1)
        for index, (branch, states) in enumerate(zip(group.branches, group.branch_states, strict=True)):
            queries = slice(group.first_state, states.stop) if index == 0 else states
            keys: tuple[slice, ...]
            if kv_mode == "shared":
                keys = (group.prompt, branch)
            else:
                keys = (slice(group.prompt.start, group.prompt.stop - 1), own(last_prompt), own(states))
            segments.append(Segment(queries, keys))
    return [segment for segment in segments if segment.sizes[0]]


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T_q, Dh)
    key: Tensor,  # (1, Hkv, T_q, Dh)
    value: Tensor,  # (1, Hkv, T_q, Dv)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (Hq,) attention sinks
    packed: PackedAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T_q, Hq, Dv)
    """Attention of one layer over packed rows, in the signature of transformers' attention interface.

    Without dropout in either stream: the base is frozen, and the Q-values are compared with it.
    """
    if packed is None:
        raise ValueError(f"attention implementation {NAME!r} is for packed batches; it got none")
    own_rules = {"attention_mask": attention_mask, **{name: kwargs.get(name) for name in ("position_bias", "indices")}}
    unsupported = [name for name, value in own_rules.items() if value is not None]  # we ask the model for no mask
    if unsupported:
        raise ValueError(f"packed training does not support {unsupported} of {type(module).__name__}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = packed.keys_and_values(layer, key, value)
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    if rule.is_plain and _half_on_cpu(query, values):
        segments = [(each.queries, each.keys, packed.additive_mask(each, rule.window)) for each in packed.segments]
        output = CpuAttentionFunction.apply(query, keys, values, segments, rule.scaling)
        return output.transpose(1, 2), None

    if _fits_padding(query, keys, packed):
        padded = packed.padded(query, keys)
        mask = packed.padded_mask(padded, query, keys, rule)
        return padded_attention(query, keys, values, padded, mask, rule).transpose(1, 2), None

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # cuDNN would build a plan for every new shape.
        with contextlib.nullcontext() if query.device.type == "cpu" else sdpa_kernel(WITHOUT_CUDNN):
            outputs = [_attend_segment(segment, query, keys, values, packed, rule) for segment in packed.segments]
        return torch.cat(outputs, dim=2)

    if torch.is_grad_enabled() and query.requires_grad and not rule.is_plain:
        # Explicit scores are quadratic: form them again in the backward pass.
        output = checkpoint(attend, query, keys, values, use_reentrant=False, preserve_rng_state=False)
    else:
        output = attend(query, keys, values)
    return output.transpose(1, 2), None


def _fits_padding(query: Tensor, keys: Tensor, packed: PackedAttention) -> bool:
    """Whether all segments go into one call. On a CPU calls cost nothing."""
    group = query.shape[1] // keys.shape[1]
    return query.device.type != "cpu" and group * scores_of([each.sizes for each in packed.segments]) <= MOST_SCORES


def _half_on_cpu(query: Tensor, values: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and query.device.type == "cpu" and query.shape[-1] == values.shape[-1]


def _attend_segment(
    segment: Segment, query: Tensor, keys: Tensor, values: Tensor, packed: PackedAttention, rule: ScoreRule
) -> Tensor:  # (1, Hq, rows, Dv)
    """Attention of one segment's query rows over its key rows."""
    q = query[:, :, segment.queries]
    k, v = rows_of(keys, segment.keys), rows_of(values, segment.keys)
    if rule.is_plain and segment.is_causal_square(rule.window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scaling, enable_gqa=True)
    mask = packed.mask(segment, rule.window, query.device)
    if rule.is_plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scaling, enable_gqa=True)
    return explicit_attention(q, k, v, mask, rule)[0]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The segments say who sees whom; the model need not build a mask."""
    return None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)


@contextlib.contextmanager
def attention_of(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Let `decoder` use the registered attention `name` inside the context."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def packed_attention_of(decoder: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Let `decoder` use packed attention inside the context."""
    return attention_of(decoder, NAME)
