"""Q rows in vLLM's attention: further query heads of their tokens, on the K/V of the base, or on K/V of their own.

`Attention` calls a backend's implementation with queries, keys and values of all N + R rows. We put a subclass of that
implementation in its place. It comes behind the custom op that hides attention from torch.compile, so it may look at
the rows of the step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from fastqadapter.integrations.vllm.step import Step


def share_kv(layer: Attention, step: Step, streams: int) -> None:
    """`shared` mode: a query head for each head and stream, of which each reads the K/V of the base."""
    layer.impl = _make(_shared(layer.impl.__class__), layer, layer.num_heads * (1 + streams))
    layer.impl.step, layer.impl.streams = step, streams


def own_kv(layer: Attention, step: Step, vllm_config: VllmConfig) -> None:
    """`separate` mode: a second layer with K/V of the Q rows, on the same block table."""
    old: Any = layer.impl
    other = Attention(
        layer.num_heads,
        layer.head_size,
        old.scale,
        layer.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=layer.quant_config,
        logits_soft_cap=_softcap(layer),
        per_layer_sliding_window=layer.sliding_window,
        prefix=f"{layer.layer_name}.q_stream",
        attn_type=layer.attn_type,
    )
    layer.impl = _make(_separate(old.__class__), layer, layer.num_heads)
    layer.impl.step, layer.impl.other = step, other
    layer.q_stream = other  # a submodule: vLLM finishes each `Attention` that it finds after loading


BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")  # that take the number of query heads from the layer


def check_attention(model: nn.Module) -> list[Attention]:
    """The attention layers of a model.

    Raises:
        ValueError: one that cannot carry the rows.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
    for layer in layers:
        reason = None
        if type(layer) is not Attention:
            reason = f"its attention is {type(layer).__name__}"
        elif layer.has_sink:
            reason = "its attention has sinks"
        elif getattr(layer.impl, "alibi_slopes", None) is not None:
            reason = "its attention has ALiBi"
        elif layer.kv_sharing_target_layer_name is not None:
            reason = "its layers share K/V with each other"
        elif layer.attn_backend.get_name() not in BACKENDS:
            name = layer.attn_backend.get_name()
            raise ValueError(
                f"attention backend {name} cannot serve a Q-Adapter: choose --attention-backend FLASH_ATTN"
            )
        if reason is not None:
            name = type(model).__name__
            raise ValueError(f"{name} cannot serve a Q-Adapter: {reason}; use `fastqadapter generate`")
    return layers


def _softcap(layer: Attention) -> float | None:
    return getattr(layer.impl, "logits_soft_cap", None) or None


def _make(made: type, layer: Attention, num_heads: int) -> Any:
    """An implementation like that of the layer, of another class and with so many query heads."""
    extra = {"use_alibi_sqrt": False} if layer.attn_backend.supports_alibi_sqrt() else {}
    old: Any = layer.impl
    return made(
        num_heads,
        layer.head_size,
        old.scale,
        layer.num_kv_heads,
        None,
        layer.sliding_window,
        layer.kv_cache_dtype,
        _softcap(layer),
        layer.attn_type,
        None,
        **extra,
    )


@functools.cache
def _shared(implementation: Any) -> type:
    class SharedKV(implementation):
        step: Step
        streams: int

        def forward(
            self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
            output: Tensor, *args: Any, **kwargs: Any,
        ) -> Tensor:  # fmt: skip
            tokens = self.step.tokens
            packed = self._pack(query)
            result = packed.new_empty(packed.shape, dtype=output.dtype)  # queries may be quantized
            if attn_metadata is None:  # the profiling run: the memory above is taken, nothing is computed
                return output.fill_(0)
            super().forward(
                layer, packed, key[:tokens], value[:tokens], kv_cache, attn_metadata, result, *args, **kwargs
            )
            self._unpack(result, output)
            return output

        def do_kv_cache_update(
            self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
        ) -> None:
            tokens = self.step.tokens
            super().do_kv_cache_update(layer, key[:tokens], value[:tokens], kv_cache, slot_mapping)

        def _pack(self, query: Tensor) -> Tensor:
            """(N + R, H, d) -> (N, (1 + S) H, d). The heads that read one K/V head must stand side by side."""
            by_kv = query.unflatten(1, (self.num_kv_heads, -1))  # (N + R, Hkv, g, d)
            tokens, rows = self.step.tokens, self.step.rows
            if rows is not None and rows.in_order and self.streams == 1:
                return torch.stack([by_kv[:tokens], by_kv[tokens:]], dim=2).flatten(1, 3)
            packed = by_kv.new_zeros(tokens, self.num_kv_heads, 1 + self.streams, *by_kv.shape[2:])
            packed[:, :, 0] = by_kv[:tokens]
            if rows is not None:
                packed[rows.tokens, :, rows.streams] = by_kv[tokens:]
            return packed.flatten(1, 3)

        def _unpack(self, result: Tensor, output: Tensor) -> None:
            """The inverse, into `output` (N + R, H, d)."""
            by_kv = output.unflatten(1, (self.num_kv_heads, -1))
            tokens, rows = self.step.tokens, self.step.rows
            packed = result.unflatten(1, (self.num_kv_heads, 1 + self.streams, -1))
            by_kv[:tokens] = packed[:, :, 0]
            if rows is None:
                return
            if rows.in_order and self.streams == 1:
                by_kv[tokens:] = packed[:, :, 1]
            else:
                by_kv[tokens:] = packed[rows.tokens, :, rows.streams]

    return SharedKV


@functools.cache
def _separate(implementation: Any) -> type:
    class SeparateKV(implementation):
        step: Step
        other: Attention

        def forward(
            self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
            output: Tensor, *args: Any, **kwargs: Any,
        ) -> Tensor:  # fmt: skip
            if attn_metadata is None:
                return output.fill_(0)
            tokens, other = self.step.tokens, self.other
            base, adapted = zip(*((each[:tokens], each[tokens:]) for each in (query, key, value)), strict=True)
            super().forward(layer, *base, kv_cache, attn_metadata, output[:tokens], *args, **kwargs)
            if self.step.rows is None:
                return output
            metadata = get_forward_context().attn_metadata[other.layer_name]
            other.impl.forward(other, *adapted, other.kv_cache, metadata, output[tokens:], *args, **kwargs)
            return output

        def do_kv_cache_update(
            self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
        ) -> None:
            tokens, other = self.step.tokens, self.other
            super().do_kv_cache_update(layer, key[:tokens], value[:tokens], kv_cache, slot_mapping)
            if self.step.rows is None:
                return
            # Its own slots: where layers differ (a window), vLLM may have put the two into different groups.
            slots = get_forward_context().slot_mapping[other.layer_name]
            other.impl.do_kv_cache_update(other, key[tokens:], value[tokens:], other.kv_cache, slots)

    return SeparateKV
