"""Half-precision attention on the CPU against explicit attention in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastqadapter.models.attention import PackedAttention, base_segments, packed_attention, q_segments
from fastqadapter.models.cpu_attention import CpuAttentionFunction
from fastqadapter.packing import PackedPairs, pack_pairs
from fastqadapter.testing import assert_close_to_truth

HEADS, KV_HEADS, SIZE = 6, 2, 8
BATCH = pack_pairs([(range(5), range(4), range(7)), (range(1), range(1), range(3)), (range(9), range(2), range(1))])


class Layer(torch.nn.Module):
    layer_idx = 0


def explicit(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """(T_q, H, D) by the definition: softmax of masked scores, each query head reading the K/V head of its group."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ value)[0].transpose(0, 1)


def seen_by(batch: PackedPairs, kv_mode: str, window: int | None) -> Tensor:
    """(T_q, T_kv) bool, row by row from what each token is: its place in its prompt or response."""
    tokens = []
    for pair, group in enumerate(batch.layout):
        for branch, rows in enumerate([group.prompt, *group.branches]):
            begin = 0 if branch == 0 else group.prompt.stop - group.prompt.start
            tokens += [(pair, branch, begin + index, row) for index, row in enumerate(range(rows.start, rows.stop))]

    def sees(query: tuple[int, int, int, int], key: tuple[int, int, int, int]) -> bool:
        distance = query[2] - key[2]
        return query[0] == key[0] and key[1] in (0, query[1]) and 0 <= distance < (window or 99)

    queries = tokens if kv_mode == "separate" else [tokens[row] for row in batch.state_rows().tolist()]
    columns = [[sees(query, key) for key in tokens] for query in queries]
    if kv_mode == "prompt":  # base K/V of the prompt but its last token, then the state rows' own
        ends = {group.prompt.stop - 1 for group in batch.layout}
        for line, query in zip(columns, queries, strict=True):
            for index, key in enumerate(tokens):
                line[index] &= key[1] == 0 and key[3] not in ends
            line.extend(sees(query, key) for key in queries)
    return torch.tensor(columns)


def inputs(dtype: torch.dtype, rows: int, keys: int, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(1, HEADS, rows, SIZE), (1, KV_HEADS, keys, SIZE), (1, KV_HEADS, keys, SIZE)]
    return [(torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for shape in shapes]


def packed(kv_mode: str, recorded: dict[int, tuple[Tensor, Tensor]] | None) -> PackedAttention:
    if kv_mode == "separate":
        return PackedAttention(base_segments(BATCH), "own")
    return PackedAttention(q_segments(BATCH, kv_mode), "base" if kv_mode == "shared" else "base+own", recorded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("kv_mode", ["separate", "prompt", "shared"])
def test_equals_explicit_attention(kv_mode: str, window: int | None, scale: float, dtype: torch.dtype) -> None:
    tokens, states = BATCH.input_ids.shape[0], BATCH.state_rows().shape[0]
    rows = tokens if kv_mode == "separate" else states
    base_key, base_value = inputs(dtype, tokens, tokens, scale)[1:]
    query, key, value = (tensor.requires_grad_() for tensor in inputs(dtype, rows, rows, scale))
    attention = packed(kv_mode, {0: (base_key, base_value)})
    output, _ = packed_attention(Layer(), query, key, value, None, sliding_window=window, packed=attention)
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=torch.float64).view_as(output)
    trained = [query] if kv_mode == "shared" else [query, key, value]
    ours = [output, *torch.autograd.grad((output * weights.to(dtype)).sum(), trained)]

    def by_definition(as_dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (tensor.detach().to(as_dtype).requires_grad_() for tensor in (query, key, value))
        keys, values = k, v
        if kv_mode == "shared":
            keys, values = base_key.to(as_dtype), base_value.to(as_dtype)
        elif kv_mode == "prompt":
            keys, values = (torch.cat([a.to(as_dtype), b], dim=2) for a, b in ((base_key, k), (base_value, v)))
        result = explicit(q, keys, values, seen_by(BATCH, kv_mode, window))[None]
        gradients = torch.autograd.grad(
            (result * weights.to(as_dtype)).sum(), [q] if kv_mode == "shared" else [q, k, v]
        )
        return [result, *gradients]

    for name, *three in zip("oqkv", ours, by_definition(dtype), by_definition(torch.float64), strict=False):
        assert_close_to_truth(*three, name=name, dtype=dtype)


def test_keeps_half_precision_and_no_gradient_that_nobody_asked_for() -> None:
    saved: list[Tensor] = []
    query, key, value = inputs(torch.bfloat16, 7, 7, 1.0)
    query.requires_grad_()
    segments = [(slice(0, 7), (slice(0, 7),), None)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = CpuAttentionFunction.apply(query, key, value, segments, 0.3)
    assert output.dtype == torch.bfloat16
    assert [tensor.dtype for tensor in saved] == [torch.bfloat16] * 4 + [torch.float32]  # q, k, v, output; lse
    assert saved[-1].numel() == HEADS * 7
    output.float().sum().backward()
    assert query.grad is not None and key.grad is None and value.grad is None
