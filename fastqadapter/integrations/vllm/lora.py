"""LoRA on the Q rows of a step: all served adapters lie in memory, each row takes its own.

The `A` of all adapters on a layer are one matrix, and so are the `B`: a row's product with all `A` is masked to the
columns of its adapter. That is one product in and one out, whatever the adapters of a batch, and cheap while there are
few of them. The layers stay vLLM's; a forward hook adds to their output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.utils.torch_utils import direct_register_custom_op

from fastqadapter.integrations.vllm.step import Step
from fastqadapter.integrations.vllm.weights import Pair


@dataclasses.dataclass
class Part:
    """A layer of transformers within a layer of vLLM, which may hold several (q, k and v; gate and up)."""

    pairs: dict[int, Pair]  # by adapter, this rank's share
    outputs: slice  # of the layer of vLLM, on this rank


class LayerLora(nn.Module):
    """The adapters on one linear layer of vLLM. Its tensors are buffers, which an engine that sleeps keeps."""

    a: Tensor  # (D_in, P), the `A` of all parts and adapters side by side

    def __init__(self, layer: Any, parts: Sequence[Part], step: Step):
        super().__init__()
        self.step = step
        dtype, device = step.dtype, step.device
        columns: list[int] = []  # the adapter of each column of `a`
        a: list[Tensor] = []
        self.products: list[tuple[slice, slice, str]] = []  # columns of `a`, outputs, the buffer of their `B`
        for part in parts:
            start = len(columns)
            for adapter, (own_a, _) in part.pairs.items():
                columns += [adapter] * len(own_a)
                a.append(own_a)
            b, name = torch.cat([own_b.T for _, own_b in part.pairs.values()]), f"b_{len(self.products)}"
            self.register_buffer(name, b.to(device, dtype), persistent=False)
            self.products.append((slice(start, len(columns)), part.outputs, name))
        self.register_buffer("a", torch.cat(a).T.to(device, dtype).contiguous(), persistent=False)
        self.columns = tuple(columns)
        self.sums_over_ranks = isinstance(layer, RowParallelLinear) and layer.tp_size > 1

    def add(self, y: Tensor, x: Tensor) -> None:
        """`y += x A B` on the Q rows, in place; y (..., N + R, D_out), x (..., N + R, D_in)."""
        step, rows = self.step, self.step.rows
        if rows is None or not len(rows.tokens):
            return
        x, y = x.flatten(0, -2), y.flatten(0, -2)  # the Transformers backend has a batch of one in front
        low_rank = x[step.tokens :].to(self.a.dtype) @ self.a
        if self.sums_over_ranks:  # each has a part of the inputs
            low_rank = tensor_model_parallel_all_reduce(low_rank)
        mask = step.mask(self.columns)
        if mask is not None:
            low_rank *= mask
        own = y[step.tokens :]
        for columns, outputs, b in self.products:
            # Not `+=`, which would then copy the slice onto itself.
            own[:, outputs].add_(low_rank[:, columns] @ getattr(self, b))


def attach(model: nn.Module, adapters: Mapping[str, Mapping[str, Pair]], step: Step, layers: dict[str, Any]) -> None:
    """Put adapters, by name, on the linear layers of a model; `layers` is vLLM's table of what hides from a compiler.

    Raises:
        ValueError: an adapter has weights for a layer that the model has not, or of another size.
    """
    left = {name: set(pairs) for name, pairs in adapters.items()}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, LinearBase):
            continue
        parts = []
        for part_name, outputs, rank in _parts(model, name, layer):
            pairs = {}
            for number, (adapter, own) in enumerate(adapters.items()):
                if part_name in own:
                    pairs[number] = _of_rank(layer, own[part_name], outputs, rank, f"adapter {adapter!r}: {part_name}")
                    left[adapter].discard(part_name)
            if pairs:
                parts.append(Part(pairs, outputs))
        if parts:
            _check_split(name, layer, parts)
            key = f"{name}.q_rows"
            layer.q_rows = layers[key] = LayerLora(layer, parts, step)
            layer.register_forward_hook(_hook(layer.q_rows, key))
    for adapter, unknown in left.items():
        if unknown:
            raise ValueError(
                f"adapter {adapter!r} has weights for {min(unknown)!r}, which is no linear layer of "
                f"{type(model).__name__}: it was trained on another base model"
            )


def _check_split(name: str, layer: Any, parts: Sequence[Part]) -> None:
    """Raise a ValueError for layers whose share on a rank is no slice of the whole."""
    if getattr(layer, "tp_size", 1) == 1:
        return
    whole = len(parts) == 1 and parts[0].outputs == slice(0, sum(getattr(layer, "output_partition_sizes", [])))
    packed = whole and len(layer.output_partition_sizes) > 1
    if packed or getattr(layer, "gather_output", False) or not getattr(layer, "input_is_parallel", True):
        raise ValueError(f"{name} is split over the ranks in a way that its adapters cannot be: use one rank")


def _parts(model: Any, name: str, layer: Any) -> Iterator[tuple[str, slice, int]]:
    """Names in transformers of what a layer of vLLM holds, its outputs and the rank among those that share it."""
    parent, dot, last = name.rpartition(".")
    names = getattr(model, "packed_modules_mapping", {}).get(last, [last])
    sizes = getattr(layer, "output_partition_sizes", [layer.output_size])
    if len(names) != len(sizes):  # one layer in transformers too
        names, sizes = [last], [sum(sizes)]
    start = 0
    for number, (part, size) in enumerate(zip(names, sizes, strict=True)):
        rank = getattr(layer, "tp_rank", 0)
        if isinstance(layer, QKVParallelLinear) and number > 0:
            rank //= layer.num_kv_head_replicas
        yield f"{parent}{dot}{part}", slice(start, start + size), rank
        start += size


def _of_rank(layer: Any, pair: Pair, outputs: slice, rank: int, what: str) -> Pair:
    a, b = pair
    size = outputs.stop - outputs.start
    if isinstance(layer, RowParallelLinear):
        own = layer.input_size_per_partition
        wanted = own * layer.tp_size, size
        a = a[:, rank * own : (rank + 1) * own]
    elif isinstance(layer, ColumnParallelLinear):
        wanted = layer.input_size, size * layer.tp_size
        if isinstance(layer, QKVParallelLinear) and outputs.start > 0:
            wanted = layer.input_size, size * layer.tp_size // layer.num_kv_head_replicas
        b = b[rank * size : (rank + 1) * size]
    else:
        wanted = layer.input_size, size
    found = pair[0].shape[1], pair[1].shape[0]
    if found != wanted:
        raise ValueError(f"{what} is for {found[0]} inputs and {found[1]} outputs, the base model has {wanted}")
    return a, b


def _hook(lora: LayerLora, key: str) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if torch.compiler.is_compiling():  # which rows there are is not for the compiler to see
            torch.ops.fastqadapter_vllm.add_lora(y, inputs[0], key)
        else:
            lora.add(y, inputs[0])

    return add


def _add_lora(y: Tensor, x: Tensor, key: str) -> None:
    get_forward_context().no_compile_layers[key].add(y, x)


def _add_lora_fake(y: Tensor, x: Tensor, key: str) -> None:
    return


_library = torch.library.Library("fastqadapter_vllm", "FRAGMENT")
direct_register_custom_op("add_lora", _add_lora, mutates_args=["y"], fake_impl=_add_lora_fake, target_lib=_library)
