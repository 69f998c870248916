"""The attention that packed training has on a GPU, run on the CPU: all segments of a layer in one padded call."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastqadapter.models.attention import PackedAttention, ScoreRule, base_segments
from fastqadapter.models.padded_attention import ALIGNED, PaddedSegments, attention_mask, scores_of
from fastqadapter.packing import pack_pairs
from generation_cases import each_mode
from test_cpu_attention import test_equals_explicit_attention as attention_equals_explicit
from tiny import ARCHITECTURES, loss_and_gradients, make_twins

module = importlib.import_module("fastqadapter.models.attention")


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_half_on_cpu", lambda *args: False)
    monkeypatch.setattr(module, "_fits_padding", lambda *args: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("window", [None, 3, 100])
@each_mode
def test_equals_explicit_attention(
    padded: None, kv_mode: str, window: int | None, scale: float, dtype: torch.dtype
) -> None:
    attention_equals_explicit(kv_mode, window, scale, dtype)


@each_mode
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_models(name: str, kv_mode: str, request: pytest.FixtureRequest) -> None:
    """Soft-caps, sinks, sliding windows, values of another size than keys."""
    model = make_twins(name, kv_mode).model
    expected, gradients = loss_and_gradients(model)
    request.getfixturevalue("padded")
    found, ours = loss_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    scale = max(gradient.norm() for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        assert (ours[parameter] - gradient).norm() <= 1e-5 * scale, parameter


def test_layers_with_other_heads_have_other_masks() -> None:
    batch = pack_pairs([(range(5), range(4), range(7))])
    packed = PackedAttention(base_segments(batch), "own")
    query = torch.zeros(1, 4, len(batch.input_ids), 8)
    padded = packed.padded(query, query)
    for keys, dtype in ((4, torch.float32), (2, torch.float32), (2, torch.bfloat16)):
        states = torch.zeros(1, keys, len(batch.input_ids), 8, dtype=dtype)
        rule = ScoreRule(0.5, None, None, None)
        found = packed.padded_mask(padded, query.to(dtype), states, rule)
        expected = attention_mask(padded, query.to(dtype), states, rule)
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_padding_is_spread_and_seen_by_nobody() -> None:
    batch = pack_pairs([(range(5), range(4), range(7)), (range(1), range(1), range(3))])
    segments = base_segments(batch)
    rows = len(batch.input_ids)
    slots = PaddedSegments.build(
        [(range(each.queries.start, each.queries.stop), each.key_rows) for each in segments],
        rows,
        rows,
        batch.input_ids.device,
    )
    count, _, longest = slots.shape
    assert longest % ALIGNED == 0
    assert scores_of([each.sizes for each in segments]) <= slots.shape[0] * slots.shape[1] * longest
    for index in (slots.queries, slots.keys):
        used = torch.bincount(index, minlength=rows)
        assert used.max() <= 2 + len(index) // rows + 1
    seen = slots.mask(None)[:, 0]
    assert seen.any(dim=-1).all()  # a query that saw nothing would be NaN, and its gradient too
    for number in range(count):
        assert not seen[number, :, int(slots.key_counts[number]) :].any()


def test_long_segments_go_one_by_one() -> None:
    """Padding 15 short segments to the length of one of 8192 tokens would cost 16 times its attention, and memory."""
    short, long = (20, 20), (8192, 8192)
    assert scores_of([short] * 16) <= module.MOST_SCORES < scores_of([long] + [short] * 15)
