"""Attention of several streams at once, against the formula, stream by stream and head by head."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastqadapter.models import stream_attention as streams
from fastqadapter.testing import assert_close_to_truth

LAYER = SimpleNamespace(layer_idx=0)
BATCH, KV_HEADS, GROUP, SIZE = 2, 3, 2, 8


class Prefix:
    """As much of a cache as the attention asks for."""

    tail = 0

    def __init__(self, keys: Tensor, values: Tensor):
        self.held = keys, values

    def prefix(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.held


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_formula(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """(S B, L, Hq, Dv): each query row and head by itself; K/V and mask have as many rows as the queries."""
    output = torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1], dtype=query.dtype)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            kv = head // (query.shape[1] // key.shape[1])
            for token in range(query.shape[2]):
                scores = key[row, kv] @ query[row, head, token] / math.sqrt(query.shape[-1])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores.masked_fill(~mask[row, 0, token], -torch.inf)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1]])
                weights = torch.softmax(scores, dim=0)[: key.shape[2]]
                output[row, token, head] = weights @ value[row, kv]
    return output


def ragged_mask(rows: int, queries: int, keys: int, window: int | None = None) -> Tensor:
    """(rows, 1, queries, keys): bottom-right causal, and left padding of another length in each row."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    padding = torch.arange(keys)[None, :] >= torch.arange(rows)[:, None]
    return seen[None, None] & padding[:, None, None]


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft-cap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.linspace(-2, 3, KV_HEADS * GROUP, dtype=torch.float64)},
}


def check(name: str, dtype: torch.dtype, inputs: list[Tensor], run: Any, truth: Tensor) -> None:
    """`run` on the inputs in `dtype`, by the rule of all accuracy tests; eager is the formula in that dtype."""
    found, eager = run([tensor.to(dtype) for tensor in inputs])
    assert_close_to_truth(found, eager, truth, name=name, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["ordinary", "peaked"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "ragged"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("rule", RULES)
def test_streams_on_the_keys_of_the_base(
    rule: str, number: int, length: int, masked: bool, scale: float, dtype: torch.dtype
) -> None:
    query = draw(number * BATCH, KV_HEADS * GROUP, length, SIZE, scale=scale)
    key, value = draw(BATCH, KV_HEADS, 7, SIZE, seed=1), draw(BATCH, KV_HEADS, 7, SIZE, seed=2)
    mask = ragged_mask(BATCH, length, 7) if masked else None
    everywhere = (
        ragged_mask(BATCH, length, 7) if masked else ragged_mask(1, length, 7).expand(BATCH, -1, -1, -1)
    ).repeat(number, 1, 1, 1)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sinks = RULES[rule].get("s_aux")
        sinks = None if sinks is None else sinks.to(q.dtype)
        k, v = k.repeat(number, 1, 1, 1), v.repeat(number, 1, 1, 1)
        return by_formula(q, k, v, everywhere, RULES[rule].get("softcap"), sinks)

    def run(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        found, _ = streams.stream_attention(LAYER, *inputs, mask, **RULES[rule])
        return found, formula(*inputs)

    check(rule, dtype, [query, key, value], run, formula(query, key, value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_streams_behind_a_shared_prompt(
    rule: str, number: int, length: int, window: int | None, dtype: torch.dtype
) -> None:
    """Two calls merged by their log-sum-exps. With the window, and for the padded row, no key of the prompt is left."""
    prompt, own = 2, 5
    rows = number * BATCH
    query = draw(rows, KV_HEADS * GROUP, length, SIZE)
    prefix = [draw(BATCH, KV_HEADS, prompt, SIZE, seed=3), draw(BATCH, KV_HEADS, prompt, SIZE, seed=4)]
    suffix = [draw(rows, KV_HEADS, own, SIZE, seed=5), draw(rows, KV_HEADS, own, SIZE, seed=6)]
    mask = ragged_mask(BATCH, length, prompt + own, window)
    mask[1, :, :, :prompt] = False
    everywhere = mask.repeat(number, 1, 1, 1)

    def joined(inputs: list[Tensor]) -> list[Tensor]:
        query, prompt_key, prompt_value, own_key, own_value = inputs
        pairs = ((prompt_key, own_key), (prompt_value, own_value))
        return [query, *(torch.cat([first.repeat(number, 1, 1, 1), second], dim=2) for first, second in pairs)]

    def formula(inputs: list[Tensor]) -> Tensor:
        sinks = RULES[rule].get("s_aux")
        sinks = None if sinks is None else sinks.to(inputs[0].dtype)
        return by_formula(*joined(inputs), everywhere, RULES[rule].get("softcap"), sinks)

    def run(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        query, prompt_key, prompt_value, *own = inputs
        found, _ = streams.stream_attention(
            LAYER, query, *own, everywhere, stream_cache=Prefix(prompt_key, prompt_value), **RULES[rule]
        )
        return found, formula(inputs)

    inputs = [query, *prefix, *suffix]
    check(rule, dtype, inputs, run, formula(inputs))


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "ragged"])
@pytest.mark.parametrize("tail", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_rows_that_come_along_with_a_prompt(rule: str, tail: int, masked: bool, window: int | None, past: int) -> None:
    """`tail` rows behind L tokens see what the last of these sees, and nobody sees them."""
    length, keys = 4, 4 + past
    query = draw(BATCH, KV_HEADS * GROUP, length + tail, SIZE)
    key, value = draw(BATCH, KV_HEADS, keys, SIZE, seed=1), draw(BATCH, KV_HEADS, keys, SIZE, seed=2)
    seen = ragged_mask(BATCH if masked else 1, length, keys, window).expand(BATCH, -1, -1, -1)
    seen = torch.cat([seen, *[seen[:, :, -1:]] * tail], dim=2)
    mask = torch.cat([seen, torch.ones(BATCH, 1, length + tail, tail, dtype=torch.bool)], dim=3) if masked else None
    cache = SimpleNamespace(tail=tail)
    found, _ = streams.stream_attention(
        LAYER, query, key, value, mask, sliding_window=window, stream_cache=cache, **RULES[rule]
    )
    expected = by_formula(query, key, value, seen, RULES[rule].get("softcap"), RULES[rule].get("s_aux"))
    torch.testing.assert_close(found, expected.nan_to_num(0.0))  # a row of padding sees no key


@pytest.mark.parametrize("length", [1, 2])
def test_streams_behind_a_prompt_without_a_mask(length: int) -> None:
    query, prefix = draw(4, 6, length, SIZE), (draw(2, 3, 5, SIZE, seed=1), draw(2, 3, 5, SIZE, seed=2))
    own = draw(4, 3, length, SIZE, seed=3), draw(4, 3, length, SIZE, seed=4)
    found, _ = streams.stream_attention(LAYER, query, *own, None, stream_cache=Prefix(*prefix))
    key, value = (
        torch.cat([first.repeat(2, 1, 1, 1), second], dim=2) for first, second in zip(prefix, own, strict=True)
    )
    torch.testing.assert_close(
        found, by_formula(query, key, value, ragged_mask(1, length, 5 + length).repeat(4, 1, 1, 1))
    )


@pytest.mark.parametrize(("length", "keys"), [(1, 8), (3, 8), (8, 8)])
def test_a_window_holds_without_a_mask(length: int, keys: int) -> None:
    query, key, value = draw(4, 6, length, SIZE), draw(2, 3, keys, SIZE, seed=1), draw(2, 3, keys, SIZE, seed=2)
    found, _ = streams.stream_attention(LAYER, query, key, value, None, sliding_window=3)
    everywhere = ragged_mask(1, length, keys, 3).repeat(4, 1, 1, 1)
    torch.testing.assert_close(found, by_formula(query, key.repeat(2, 1, 1, 1), value.repeat(2, 1, 1, 1), everywhere))


@pytest.mark.parametrize("length", [1, 2])
def test_a_window_holds_behind_a_prompt_without_a_mask(length: int) -> None:
    query, prefix = draw(4, 6, length, SIZE), (draw(2, 3, 5, SIZE, seed=1), draw(2, 3, 5, SIZE, seed=2))
    own = draw(4, 3, length + 1, SIZE, seed=3), draw(4, 3, length + 1, SIZE, seed=4)
    found, _ = streams.stream_attention(LAYER, query, *own, None, sliding_window=4, stream_cache=Prefix(*prefix))
    pairs = zip(prefix, own, strict=True)
    key, value = (torch.cat([first.repeat(2, 1, 1, 1), second], dim=2) for first, second in pairs)
    everywhere = ragged_mask(1, length, 6 + length, 4).repeat(4, 1, 1, 1)
    torch.testing.assert_close(found, by_formula(query, key, value, everywhere))


def test_masks_are_left_out_for_flash_attn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed, on CUDA, without padding and without a window, and where the keys end with the queries."""
    sizes = {"batch_size": 1, "q_length": 3, "kv_length": 7, "q_offset": 4, "device": torch.device("cuda")}
    built: list[dict[str, Any]] = []
    monkeypatch.setattr(streams, "sdpa_mask", lambda **kwargs: built.append(kwargs) or torch.ones(1))
    for installed, others, left_out in (
        (True, {}, True),
        (False, {}, False),
        (True, {"device": torch.device("cpu")}, False),
        (True, {"attention_mask": torch.ones(1, 7)}, False),
        (True, {"local_size": 4}, False),
        (True, {"kv_length": 20}, False),  # a static cache
        (True, {"q_offset": torch.tensor(4)}, False),
    ):
        monkeypatch.setattr(streams, "flash_attn_func", lambda installed=installed: object() if installed else None)
        assert (streams._stream_mask(**{**sizes, **others}) is None) == left_out
    assert [kwargs["allow_is_causal_skip"] for kwargs in built] == [False] * 6


def test_fold_and_unfold_are_inverse_and_keep_the_groups() -> None:
    query = torch.arange(2 * 2 * 6 * 3 * 4.0).view(4, 6, 3, 4)
    folded = streams.fold(query, 2, 3)
    assert folded.shape == (2, 3, 4, 3, 4)
    for stream in range(2):
        for sequence in range(2):
            for head in range(6):
                kv, place = divmod(head, 2)
                row = folded[sequence, kv, 2 * stream + place]
                assert torch.equal(row, query[2 * stream + sequence, head])
    assert torch.equal(streams.unfold(folded, 2), query.transpose(1, 2))


def test_what_it_cannot_do_is_refused() -> None:
    query, key = draw(2, 2, 1, SIZE), draw(2, 1, 3, SIZE)
    with pytest.raises(ValueError, match="position_bias"):
        streams.stream_attention(nn.Linear(1, 1), query, key, key, None, position_bias=torch.zeros(1))


# --- flash-attn -------------------------------------------------------------------------------------------------------


def fake_flash_attn_func(
    q: Tensor,  # (B, L, H, D)
    k: Tensor,  # (B, T, Hkv, D)
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    return_attn_probs: bool,
) -> tuple[Tensor, Tensor, None]:
    """What flash-attn's documentation says of its function: bottom-right causal, (B, H, L) log-sum-exps, query head h
    on K/V head h // (H / Hkv), a window of `left` keys before the query's own."""
    assert causal and return_attn_probs
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = softmax_scale * q @ k.transpose(-1, -2)
    scores = scores if not softcap else softcap * torch.tanh(scores / softcap)
    window = None if window_size == (-1, -1) else window_size[0] + 1
    scores = scores.masked_fill(~ragged_mask(1, q.shape[2], k.shape[2], window), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1), None


# Behind a prompt a mask decides who sees whom, but for a single token that sees all.
@pytest.mark.parametrize(
    ("length", "window", "prompt"),
    [(1, None, False), (1, 4, False), (3, None, False), (3, 4, False), (1, None, True), (1, 20, True)],
)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_layout_for_flash_attn(
    monkeypatch: pytest.MonkeyPatch, length: int, window: int | None, softcap: float | None, prompt: bool
) -> None:
    """The calls that would go to flash-attn on a GPU, answered by its definition, against SDPA's path."""
    query = draw(3 * BATCH, KV_HEADS * GROUP, length, SIZE)
    rows = 3 * BATCH if prompt else BATCH
    own = draw(rows, KV_HEADS, 7, SIZE, seed=1), draw(rows, KV_HEADS, 7, SIZE, seed=2)
    rule: dict[str, Any] = {"sliding_window": window, "softcap": softcap}
    if prompt:
        rule["stream_cache"] = Prefix(draw(BATCH, KV_HEADS, 4, SIZE, seed=3), draw(BATCH, KV_HEADS, 4, SIZE, seed=4))
    mask = None if prompt else ragged_mask(1, length, 7, window)
    expected, _ = streams.stream_attention(LAYER, query, *own, mask, **rule)
    calls = []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return fake_flash_attn_func(*args, **kwargs)

    monkeypatch.setattr(streams, "flash_attn_func", lambda: count)
    monkeypatch.setattr(streams, "_can_use_flash", lambda query, value, mask: mask is None)
    found, _ = streams.stream_attention(LAYER, query, *own, None, **rule)
    torch.testing.assert_close(found, expected)
    assert calls[0] == (BATCH, length, KV_HEADS * 3 * GROUP, SIZE) and len(calls) == 1 + prompt


def test_flash_attn_is_looked_for_and_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    streams.flash_attn_func.cache_clear()
    monkeypatch.setattr(streams.importlib.util, "find_spec", lambda name: None)
    assert streams.flash_attn_func() is None
    module = ModuleType("flash_attn")
    module.flash_attn_func = fake_flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setattr(streams.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", module)
    streams.flash_attn_func.cache_clear()
    assert streams.flash_attn_func() is fake_flash_attn_func
    streams.flash_attn_func.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the tests above are its twins")
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(masked: bool, length: int) -> None:
    inputs = [draw(4, 6, length, 64), draw(2, 3, 33, 64, seed=1), draw(2, 3, 33, 64, seed=2)]
    mask = ragged_mask(2, length, 33) if masked else None
    truth, _ = streams.stream_attention(LAYER, *inputs, mask)
    eager, _ = streams.stream_attention(LAYER, *(each.bfloat16() for each in inputs), mask)
    on_gpu = [each.bfloat16().cuda() for each in inputs]
    found, _ = streams.stream_attention(LAYER, *on_gpu, None if mask is None else mask.cuda())
    assert_close_to_truth(found, eager, truth, name="GPU")


def test_torch_sdpa_agrees_on_who_reads_whom() -> None:
    """Head h on K/V head h // g, everywhere: what `fold` relies on."""
    query, key, value = draw(1, 6, 1, SIZE), draw(1, 3, 4, SIZE, seed=1), draw(1, 3, 4, SIZE, seed=2)
    found = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    expected = by_formula(query, key, value, torch.ones(1, 1, 1, 4, dtype=torch.bool))
    torch.testing.assert_close(found.transpose(1, 2), expected)
