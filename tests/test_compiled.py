"""Decoding with a static cache, and compiled: one graph, no breaks, no recompilation, the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import CompileConfig

from generation_cases import PROMPT, PROMPTS, each_mode, each_name, generated, trained_twins, two_adapters, with_cache
from tiny import MODES, make_twins, tiny_base

SEARCHES: list[dict[str, Any]] = [{}, {"num_beams": 3}]  # transformers compiles no beam search


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiling(backend: str = "aot_eager") -> dict[str, Any]:
    """What makes transformers' generate compile the decoding steps, on a CPU too. A graph break is an error."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@each_mode
@each_name
def test_static_cache(name: str, kv_mode: str, search: dict[str, int]) -> None:
    model = trained_twins(name, kv_mode).model
    expected = generated(model, *PROMPTS, max_new_tokens=9, **search)
    assert generated(model, *PROMPTS, max_new_tokens=9, cache_implementation="static", **search) == expected
    assert graphs() == 0  # compiled on a GPU only, unless asked for


@each_mode
def test_static_cache_grows_no_further(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    cache = with_cache(model, PROMPT, 5, cache_implementation="static").past_key_values
    rows = {"separate": 2, "prompt": 2, "shared": 1}[kv_mode]
    length = len(PROMPT) + 4 - (len(PROMPT) - 1 if kv_mode == "prompt" else 0)
    assert {layer.keys.shape[0] for layer in cache.layers} == {rows}
    assert {layer.keys.shape[2] for layer in cache.layers} == {length}


@each_mode
def test_200_tokens_in_one_graph(kv_mode: str) -> None:
    """Without a graph break or a recompilation; nor for other dials, nor in a further call."""
    model = make_twins("llama", kv_mode, base_settings={"max_position_embeddings": 256}).model
    expected = generated(model, PROMPT, max_new_tokens=200)
    assert generated(model, PROMPT, max_new_tokens=200, **compiling()) == expected
    assert graphs() == 1
    dials = {"alpha_0": 0.3, "alpha_tilde": 1.7, "adapters": {"default": -0.4}, "max_new_tokens": 200}
    assert generated(model, PROMPT, **dials, **compiling()) == generated(model, PROMPT, **dials)
    assert graphs() == 1


@pytest.mark.parametrize(
    ("name", "kv_mode"),
    [*(("gemma3", mode) for mode in MODES), *((name, "shared") for name in ("gpt_oss", "deepseek_v3", "mistral"))],
)
def test_as_many_graphs_as_the_base_needs(name: str, kv_mode: str) -> None:
    """Sliding layers of transformers' static cache need a second one, for the first step behind a long prompt."""
    base = tiny_base(name)
    generated(base, PROMPT, max_new_tokens=30, **compiling())
    needed = graphs()
    counters.clear()
    model = make_twins(name, kv_mode, lora={"layers_to_transform": [1, 2]}).model  # with a trunk
    expected = generated(model, PROMPT, max_new_tokens=30)
    assert generated(model, PROMPT, max_new_tokens=30, **compiling()) == expected
    assert 1 <= graphs() <= needed


def test_a_batch_of_mixtures() -> None:
    model = two_adapters("shared").model
    inputs = {"adapters": {"default": [1.0, 0.5, 0.0], "polite": -0.4}, "max_new_tokens": 12}
    expected = generated(model, *PROMPTS, **inputs)
    assert generated(model, *PROMPTS, **inputs, **compiling()) == expected
    assert graphs() == 1


def test_the_base_is_compiled_apart() -> None:
    twins = make_twins("llama", "shared")
    customised = generated(twins.model, PROMPT, max_new_tokens=8, **compiling())
    with twins.model.disable_adapter():
        assert generated(twins.model, PROMPT, max_new_tokens=8, **compiling()) == generated(
            twins.base, PROMPT, max_new_tokens=8
        )
    assert generated(twins.model, PROMPT, max_new_tokens=8, **compiling()) == customised


def test_with_the_default_compiler() -> None:
    """Inductor, as on a GPU; once, since it takes a while."""
    model = trained_twins("llama", "shared").model
    expected = generated(model, *PROMPTS, max_new_tokens=12)
    assert generated(model, *PROMPTS, max_new_tokens=12, **compiling("inductor")) == expected
