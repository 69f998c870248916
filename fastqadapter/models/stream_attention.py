"""Attention while generating, several streams at once.

Registered with transformers' attention interface under the name `fqa_streams`; the modelling files stay as they are.
A pass over S streams of B sequences has S * B query rows, those of the base first. Where the K/V are the base's, B
rows, the query heads of all streams that read the same K/V head become one group, so K/V are read once. Head `h` reads
K/V head `h // g`, so the streams go inside the groups: index `kv * (S * g) + s * g + j`; streams behind one another
on the head axis would read wrong K/V heads.

In `prompt` mode the K/V of the prompt are the base's and those behind it each stream's own: two calls, merged by their
log-sum-exps.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from fastqadapter.models.scores import ScoreRule, bottom_right_mask, explicit_attention

if TYPE_CHECKING:
    from fastqadapter.models.cache import StreamCache

NAME = "fqa_streams"
_cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def stream_attention(
    module: nn.Module,
    query: Tensor,  # (S B, Hq, L, Dh)
    key: Tensor,  # (B or S B, Hkv, T, Dh)
    value: Tensor,  # (B or S B, Hkv, T, Dv)
    attention_mask: Tensor | None,  # bool, (B or S B, 1, L, T), with the prompt's keys first in `prompt` mode
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (Hq,) attention sinks
    stream_cache: StreamCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (S B, L, Hq, Dv)
    """Attention of one layer for all streams, in the signature of transformers' attention interface. No dropout: the
    base is frozen, and the Q stream is compared with it."""
    unknown = [name for name in ("position_bias", "indices") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"{type(module).__name__} attends with {unknown}, which one pass for all streams cannot serve")
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    if stream_cache is not None and stream_cache.tail:
        return _attend_with_tail(query, key, value, attention_mask, rule, stream_cache.tail), None
    prefix = None if stream_cache is None else stream_cache.prefix(module.layer_idx)  # type: ignore[arg-type]
    if prefix is None:
        return _attend(query, key, value, attention_mask, rule)[0], None
    return _attend_behind_prompt(query, *prefix, key, value, attention_mask, rule), None


def _attend_with_tail(
    query: Tensor,  # (B, Hq, L + n, Dh)
    key: Tensor,  # (B, Hkv, T, Dh)
    value: Tensor,
    mask: Tensor | None,  # (B, 1, L + n, T + n)
    rule: ScoreRule,
    tail: int,
) -> Tensor:  # (B, L + n, Hq, Dv)
    """Attention of L tokens and of n rows more, which see what the last token sees: one token of n streams."""
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        masks = mask[:, :, :-tail], mask[:, :, -tail - 1 : -tail]
    output, _ = _attend(query[:, :, :-tail], key, value, masks[0], rule)
    streams = query[:, :, -tail:].permute(2, 0, 1, 3).flatten(0, 1).unsqueeze(2)  # (n B, Hq, 1, Dh)
    others, _ = _attend(streams, key, value, masks[1], rule)
    return torch.cat([output, others.unflatten(0, (tail, -1)).squeeze(2).transpose(0, 1)], dim=1)


def _attend_behind_prompt(
    query: Tensor,
    prompt_key: Tensor,  # (B, Hkv, T_prompt, Dh)
    prompt_value: Tensor,
    key: Tensor,  # (S B, Hkv, T_own, Dh)
    value: Tensor,
    mask: Tensor | None,
    rule: ScoreRule,
) -> Tensor:
    """Attention over two sets of keys from the attention over each: `o = sum_i exp(lse_i - lse) o_i`."""
    length, keys = query.shape[2], prompt_key.shape[2] + key.shape[2]
    if mask is None and (length > 1 or (rule.window or keys) < keys):
        mask = bottom_right_mask(length, keys, rule.window, query.device)[None, None]
    masks = (None, None) if mask is None else mask.split([prompt_key.shape[2], key.shape[2]], dim=-1)
    rule = dataclasses.replace(rule, window=None)  # the masks say it; from its own end, neither part could
    output, lse = _attend(query, prompt_key, prompt_value, masks[0], rule, with_lse=True)
    rule = dataclasses.replace(rule, sinks=None)  # they were in the first part
    other, other_lse = _attend(query, key, value, masks[1], rule, with_lse=True)
    # (S B, Hq, L) -> (S B, L, Hq, 1). An lse is -inf where no key is in sight; both are in a row of padding alone.
    share = torch.sigmoid((lse - other_lse).nan_to_num()).transpose(1, 2)[..., None]
    return (share * output + (1 - share) * other).to(output.dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: ScoreRule, with_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """Output (S B, L, Hq, Dv) and, where asked for, its log-sum-exp (S B, Hq, L); -inf where no key is in sight."""
    length, keys, kv_heads = query.shape[2], key.shape[2], key.shape[1]
    streams = query.shape[0] // key.shape[0]
    mask = _fit_rows(mask, key.shape[0])
    grouped = fold(query, streams, kv_heads)  # (B, Hkv, S g, L, Dh)
    if rule.sinks is None and _can_use_flash(query, value, mask):
        output, lse = _flash(grouped.flatten(1, 2), key, value, rule)
    else:
        if mask is None and (1 < length < keys or (rule.window or keys) < keys):
            mask = bottom_right_mask(length, keys, rule.window, query.device)[None, None]
        if rule.is_plain and not with_lse:
            output, lse = _sdpa(grouped, key, value, mask, rule), query
        elif rule.is_plain and _can_use_cpu_kernel(query, key, value):
            q = grouped.flatten(2, 3) if length == 1 else grouped.flatten(1, 2)  # as in _sdpa
            output, lse = _cpu_attention_with_lse(q, key, value, mask, causal=length > 1, scaling=rule.scaling)
        else:
            output, lse = _explicit(grouped, key, value, mask, rule)
    if with_lse:
        lse = unfold(lse.reshape(key.shape[0], kv_heads, -1, length, 1), streams)[..., 0].transpose(1, 2)
    return unfold(output.reshape(key.shape[0], kv_heads, -1, length, value.shape[-1]), streams), lse


def _sdpa(grouped: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: ScoreRule) -> Tensor:
    length = grouped.shape[3]
    if length == 1:  # the heads of a group are rows of one product with their K/V head
        q = grouped.flatten(2, 3)
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=rule.scaling)
    return F.scaled_dot_product_attention(
        grouped.flatten(1, 2), key, value, attn_mask=mask, is_causal=mask is None, scale=rule.scaling, enable_gqa=True
    )


def _explicit(
    grouped: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    _, kv_heads, heads, length, _ = grouped.shape
    if mask is None and length > 1:
        mask = bottom_right_mask(length, key.shape[2], rule.window, grouped.device)[None, None]
    if rule.sinks is not None:  # (Hq,), of each stream in turn within a group
        sinks = rule.sinks.view(kv_heads, 1, -1)
        rule = dataclasses.replace(rule, sinks=sinks.expand(-1, heads // sinks.shape[2], -1).flatten())
    return explicit_attention(grouped.flatten(1, 2), key, value, mask, rule)


def fold(query: Tensor, streams: int, kv_heads: int) -> Tensor:
    """(S B, Hq, L, Dh) -> (B, Hkv, S g, L, Dh): the heads of all streams that read the same K/V head side by side."""
    rows, heads, length, size = query.shape
    batch, group = rows // streams, heads // kv_heads
    if streams == 1:
        return query.unflatten(1, (kv_heads, group))  # as it is: a copy of a long prompt takes its time
    apart = query.reshape(streams, batch, kv_heads, group, length, size)
    return apart.permute(1, 2, 0, 3, 4, 5).reshape(batch, kv_heads, streams * group, length, size)


def unfold(output: Tensor, streams: int) -> Tensor:
    """(B, Hkv, S g, L, Dv) -> (S B, L, Hq, Dv), the inverse of `fold` in the layout that the layers expect."""
    batch, kv_heads, heads, length, size = output.shape
    apart = output.reshape(batch, kv_heads, streams, heads // streams, length, size)
    return apart.permute(2, 0, 4, 1, 3, 5).reshape(streams * batch, length, kv_heads * heads // streams, size)


def _fit_rows(mask: Tensor | None, rows: int) -> Tensor | None:
    """The mask for the rows of the K/V: all streams of a sequence see the same positions."""
    if mask is None or mask.shape[0] in (1, rows):
        return mask
    return mask[:rows] if mask.shape[0] > rows else mask.repeat(rows // mask.shape[0], 1, 1, 1)


def _can_use_cpu_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's CPU kernel gives the log-sum-exp; its backward pass would leave out the gradient of that."""
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and not needs_grad


def _cpu_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """torch's CPU kernel, which SDPA calls too, asked for its log-sum-exp."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings make fp32 of them
    additive = None
    if mask is not None:
        additive = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    causal = causal and mask is None
    output, lse = _cpu_kernel(query, key, value, 0.0, causal, attn_mask=additive, scale=scaling)
    if mask is not None:  # where no key is in sight, torch 2.13 gives output 0 and lse 0
        lse = lse.masked_fill(~mask.any(dim=-1), -torch.inf)
    return output, lse


# --- flash-attn, where it is installed --------------------------------------------------------------------------------


@functools.cache
def flash_attn_func() -> Any:
    """flash-attn's function, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_func as function

    return function


def _can_use_flash(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """flash-attn knows no mask but the bottom-right causal one, and no other dtypes and sizes."""
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] == value.shape[-1] <= 256
    return query.is_cuda and mask is None and fits and not query.requires_grad and flash_attn_func() is not None


def _flash(query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """flash-attn over the folded heads: (B, Hkv S g, L, Dh) -> the same and its log-sum-exp (B, Hkv S g, L)."""
    window = (-1, -1) if rule.window is None else (rule.window - 1, 0)
    output, lse, _ = flash_attn_func()(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),  # (B, length, heads, size)
        softmax_scale=rule.scaling,
        causal=True,
        window_size=window,
        softcap=rule.softcap or 0.0,
        return_attn_probs=True,
    )
    return output.transpose(1, 2), lse


def _stream_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for SDPA; None only where attention to all keys, or bottom-right causal, is the same: not for
    the empty rest of a static cache."""
    queries, keys = kwargs["q_length"], kwargs["kv_length"]
    unmasked = kwargs.get("attention_mask") is None and kwargs.get("local_size") is None
    if unmasked and torch.device(kwargs.get("device", "cpu")).type == "cuda":
        ends = kwargs.get("q_offset", 0) + queries, kwargs.get("kv_offset", 0) + keys
        if all(isinstance(end, int) for end in ends) and ends[0] == ends[1] and flash_attn_func() is not None:
            return None  # flash-attn takes no mask
    skip = kwargs.get("allow_is_causal_skip", True) and queries in (1, keys)
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": skip})


AttentionInterface.register(NAME, stream_attention)
AttentionMaskInterface.register(NAME, _stream_mask)
