"""LoRA on the rows of its own stream: one pass over [rows of the base; rows of each adapter in turn].

The base's product runs over all rows at once, since weights are read once whatever the number of rows; each adapter
then adds its low-rank product to its own rows, a contiguous slice of the output. Layers that read the same input (q, k
and v; gate and up) share one product with all their `A`.

A mixin swapped in over PEFT's layer classes: PEFT's files, names and methods stay as they are. Outside of `on_rows` a
layer does what PEFT's does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastqadapter.models.lora import LeanLoraLinear

# Children of one module that read the same input, in the order in which they are called.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


class StreamRows:
    """Which rows of the pass that runs now are whose: `streams` equal parts, the base's first; or, with `tail`, those
    of the adapters are the last token rows of each of `batch` sequences."""

    def __init__(self, adapters: Sequence[str]):
        self.adapters = tuple(adapters)
        self.streams = 1 + len(self.adapters)  # 1 in a pass of the base alone
        self.tail = 0
        self.batch = 0

    @property
    def base_alone(self) -> bool:
        return self.streams == 1 and not self.tail

    def own(self, x: Tensor) -> Tensor:
        """(rows, ..., D) -> (n, rows of one adapter, D), a view where `x` is contiguous."""
        if self.tail:
            return x.reshape(self.batch, -1, x.shape[-1])[:, -self.tail :].transpose(0, 1)
        return x.reshape(self.streams, -1, x.shape[-1])[1:]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of the base, and those of each adapter."""
        if not self.tail:
            return x.chunk(self.streams)
        x = x.reshape(self.batch, -1, x.shape[-1])
        return x[:, : -self.tail], *x[:, -self.tail :].split(1, dim=1)

    def join(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of `split`; `shape` is that of what was split."""
        if not self.tail:
            return torch.cat(list(parts))
        joined = torch.cat(list(parts), dim=1)
        return joined.reshape(*shape[:-1], joined.shape[-1])


class LowRank:
    """`A` and `B` of all adapters on one layer, `B` times its scaling; ranks padded with 0.

    In the dtype of the base, but in fp32 for half precision on a CPU: the two thin products of one row take 3 us there
    in fp32 and 29 us in bf16 (D 576, rank 8, torch 2.13, two Zen 5 cores).
    """

    def __init__(self, layer: LeanLoraLinear, adapters: Sequence[str]):
        weight = layer.get_base_layer().weight
        dtype = torch.float32 if weight.device.type == "cpu" and weight.itemsize == 2 else weight.dtype
        rank = max(layer.r.get(adapter, 0) for adapter in adapters)
        a, b = [], []
        for adapter in adapters:
            if adapter in layer.r:
                a.append(_padded(layer.lora_A[adapter].weight.to(dtype), rank))
                b.append(_padded(layer.lora_B[adapter].weight.to(dtype).T * layer.scaling[adapter], rank))
            else:
                a.append(weight.new_zeros(rank, layer.in_features, dtype=dtype))
                b.append(weight.new_zeros(rank, layer.out_features, dtype=dtype))
        self.a = torch.stack(a).transpose(1, 2)  # (n, D_in, r)
        self.b = torch.stack(b)  # (n, r, D_out)
        self.source = SharedProduct([self])
        self.columns = slice(0, rank)

    def add(self, y: Tensor, x: Tensor, rows: StreamRows) -> Tensor:
        """`y += x A B` on the rows of each adapter, in place; x (S B, ..., D_in), y (S B, ..., D_out)."""
        low_rank = self.source.of(x, rows)[..., self.columns]
        y = y.contiguous()  # as products are; else `own` would be a copy
        own = rows.own(y)
        if len(own) == 1:
            own[0].add_(low_rank @ self.b[0])
        else:
            own.add_(torch.bmm(low_rank, self.b))
        return y


def _padded(weight: Tensor, rank: int) -> Tensor:
    """(r, any) -> (rank, any)."""
    return weight if weight.shape[0] == rank else F.pad(weight, (0, 0, 0, rank - weight.shape[0]))


class SharedProduct:
    """`x A` of several layers with the same input at once; each takes its columns."""

    def __init__(self, members: Sequence[LowRank]):
        self.a = members[0].a if len(members) == 1 else torch.cat([member.a for member in members], dim=2)
        self.members = len(members)
        self._input: Tensor | None = None
        self._product: Tensor | None = None
        self._left = 0

    @classmethod
    def join(cls, members: Sequence[LowRank]) -> None:
        """Let the members take their columns of one product."""
        shared = cls(members)
        start = 0
        for member in members:
            stop = start + member.columns.stop
            member.source, member.columns = shared, slice(start, stop)
            start = stop

    def of(self, x: Tensor, rows: StreamRows) -> Tensor:
        """(n, rows, r of all members), without the first axis where n is 1; computed when the first member asks, let go
        of when the last has."""
        if x is not self._input:
            own = rows.own(x).to(self.a.dtype)
            product = own[0] @ self.a[0] if len(own) == 1 else torch.bmm(own, self.a)
            if self.members == 1:
                return product
            self._input, self._product, self._left = x, product, self.members
        assert self._product is not None
        product = self._product
        self._left -= 1
        if not self._left:
            self._input = self._product = None
        return product


class RowLora:
    """Mixin over a LoRA layer of PEFT: inside `RowLoraLayers.on_rows` each adapter acts on the rows of its stream."""

    stream_rows: StreamRows | None = None
    low_rank: LowRank | None = None  # None: the adapters need PEFT's own forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.stream_rows
        if rows is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        layer: Any = self
        if not rows.base_alone and self.low_rank is not None:
            return self.low_rank.add(layer.base_layer(x), x, rows)
        if rows.base_alone or not any(adapter in layer.r for adapter in rows.adapters):
            return layer.base_layer(x)
        first, *others = rows.split(x)
        parts = [layer.base_layer(first)]
        for part, adapter in zip(others, rows.adapters, strict=True):
            # Not by set_adapter(), which walks all modules and touches requires_grad.
            before = layer._active_adapter, layer._disable_adapters
            layer._active_adapter, layer._disable_adapters = [adapter], False
            try:
                parts.append(super().forward(part))  # type: ignore[misc]
            finally:
                layer._active_adapter, layer._disable_adapters = before
        return rows.join(parts, x.shape)


class RowLeanLoraLinear(RowLora, LeanLoraLinear):
    """The plain LoRA linear layer; of other classes `_on_rows` makes such ones."""


@functools.cache
def _on_rows(cls: Any) -> type:
    if cls is LeanLoraLinear:
        return RowLeanLoraLinear
    made = type(f"Row{cls.__name__}", (RowLora, cls), {"__module__": __name__})
    globals()[made.__name__] = made  # where a copy or a pickle of the model looks for it
    return made


class RowLoraLayers:
    """The LoRA layers of a model, their classes swapped for ones that can act on rows, and which share their input."""

    def __init__(self, model: nn.Module):
        self.layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in self.layers:
            if not isinstance(layer, RowLora):
                layer.__class__ = _on_rows(layer.__class__)
        children = [module._modules for module in model.modules()]
        groups: list[list[Any]] = [[each.get(name) for name in names] for each in children for names in SHARED_INPUTS]
        siblings = [[layer for layer in group if isinstance(layer, RowLora)] for group in groups]
        self.siblings = [group for group in siblings if len(group) > 1]

    @contextlib.contextmanager
    def on_rows(self, rows: StreamRows) -> Iterator[None]:
        """Let the layers act on the rows that `rows` says. Their weights are read here, once."""
        before = [(layer.stream_rows, layer.low_rank) for layer in self.layers]
        try:
            for layer in self.layers:  # by __dict__: nn.Module's setattr takes 5 us, once for each layer and call
                layer.__dict__.update(stream_rows=rows, low_rank=_low_rank(layer, rows.adapters))
            for siblings in self.siblings:
                members = [layer.low_rank for layer in siblings if layer.low_rank is not None]
                if len(members) > 1:
                    SharedProduct.join(members)
            yield
        finally:
            for layer, (former_rows, former_low_rank) in zip(self.layers, before, strict=True):
                layer.__dict__.update(stream_rows=former_rows, low_rank=former_low_rank)


def _low_rank(layer: Any, adapters: Sequence[str]) -> LowRank | None:
    """The stacked weights, where every adapter on the layer is plain."""
    present = [adapter for adapter in adapters if adapter in layer.r]
    if not present or not isinstance(layer, LeanLoraLinear) or layer.has_autocast():
        return None
    return LowRank(layer, adapters) if all(map(layer.is_plain, present)) else None
