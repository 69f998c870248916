"""Caches that are returned, given, continued, and read by other adapters."""

from __future__ import annotations

import pytest

from generation_cases import PROMPT, PROMPTS, each_mode, generated, ids_of, trained_twins, two_adapters, with_cache
from references import CACHE_NAME
from tiny import PAD, random_ids

# --- caches -----------------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_continue_with_the_returned_cache(name: str, kv_mode: str) -> None:
    model = trained_twins(name, kv_mode).model
    whole = with_cache(model, PROMPT, 12).sequences[0].tolist()
    first = with_cache(model, PROMPT, 5)
    second = with_cache(model, first.sequences[0].tolist(), 7, **{CACHE_NAME: first[CACHE_NAME]})
    assert second.sequences[0].tolist() == whole


@pytest.mark.parametrize("kv_mode", ["separate", "shared"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_further_turn_on_the_returned_cache(name: str, kv_mode: str) -> None:
    model = trained_twins(name, kv_mode).model
    first = with_cache(model, PROMPT, 5)
    turn = first.sequences[0].tolist() + random_ids(6, seed=43)
    second = with_cache(model, turn, 5, **{CACHE_NAME: first[CACHE_NAME]})
    assert second.sequences.tolist() == with_cache(model, turn, 5).sequences.tolist()


def test_shared_mode_switches_adapters_in_the_middle() -> None:
    twins = two_adapters("shared")
    first = with_cache(twins.model, PROMPT, 5)
    ids = first.sequences[0].tolist()
    for weights in ({"polite": 1.0}, {"default": -1.0, "polite": 2.0}):
        fresh = with_cache(twins.model, ids, 4, adapters=weights)
        first = with_cache(twins.model, PROMPT, 5)
        joined = with_cache(twins.model, ids, 4, adapters=weights, **{CACHE_NAME: first[CACHE_NAME]})
        assert joined.sequences.tolist() == fresh.sequences.tolist()


@pytest.mark.parametrize("kv_mode", ["separate", "prompt"])
def test_an_adapter_cannot_join_in_the_middle(kv_mode: str) -> None:
    twins = two_adapters(kv_mode)
    first = with_cache(twins.model, PROMPT, 3)
    ids = first.sequences[0].tolist()
    with pytest.raises(ValueError, match="'polite' has no K/V of its own"):
        with_cache(twins.model, ids, 3, adapters={"polite": 1.0}, **{CACHE_NAME: first[CACHE_NAME]})


@pytest.mark.parametrize("kv_mode", ["separate", "prompt"])
def test_an_adapter_cannot_come_back_after_a_pause(kv_mode: str) -> None:
    """While it was away its own K/V stood still: going on from them would be silently wrong."""
    twins = two_adapters(kv_mode)
    both = {"default": 1.0, "polite": 1.0}
    first = with_cache(twins.model, PROMPT, 3, adapters=both)
    second = with_cache(twins.model, first.sequences[0].tolist(), 3, **{CACHE_NAME: first[CACHE_NAME]})
    ids = second.sequences[0].tolist()
    with pytest.raises(ValueError, match="'polite'"):
        with_cache(twins.model, ids, 3, adapters=both, **{CACHE_NAME: second[CACHE_NAME]})


@pytest.mark.parametrize("kv_mode", ["separate", "shared"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_without_cache_and_in_chunks(name: str, kv_mode: str) -> None:
    model = trained_twins(name, kv_mode).model
    expected = generated(model, *PROMPTS, max_new_tokens=8)
    assert generated(model, *PROMPTS, max_new_tokens=8, use_cache=False) == expected
    assert generated(model, *PROMPTS, max_new_tokens=8, prefill_chunk_size=4) == expected


@each_mode
def test_inputs_embeds(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    inputs = ids_of(*PROMPTS)
    expected = generated(model, *PROMPTS, max_new_tokens=8)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    tokens = model.generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=PAD,
    )
    assert tokens.tolist() == expected


@pytest.mark.parametrize("kv_mode", ["separate", "shared"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prompt_lookup_decoding(name: str, kv_mode: str) -> None:
    """Assisted decoding feeds several tokens and takes the rejected ones back out of every cache."""
    model = trained_twins(name, kv_mode).model
    prompt = PROMPT + PROMPT[:5]  # n-grams to find
    expected = generated(model, prompt, max_new_tokens=16)
    assert generated(model, prompt, max_new_tokens=16, prompt_lookup_num_tokens=3) == expected
