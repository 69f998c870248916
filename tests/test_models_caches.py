"""Caches that are returned, given, continued, and read by other adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fastqadapter as fqa
from generation_cases import PROMPT, PROMPTS, each_mode, generated, ids_of, trained_twins, two_adapters, with_cache
from references import CACHE_NAME
from tiny import PAD, make_twins, random_ids

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


# --- K/V of the base, given by the user -------------------------------------------------------------------------------


def filled_by_base(model: fqa.QAdapterModel, *prompts: list[int]) -> DynamicCache:
    """A long system prompt or a document, read once by the base model."""
    with model.disable_adapter(), torch.no_grad():
        inner = model.get_base_model()
        cache = DynamicCache(config=inner.config)
        inner(**ids_of(*prompts), **{CACHE_NAME: cache})
    return cache


def contents(cache: DynamicCache) -> list[Tensor]:
    return [each for layer in cache.layers for each in (layer.keys, layer.values)]


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("kv_mode", ["prompt", "shared"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_a_cache_of_the_base_serves_every_adapter_and_stays_as_it_is(
    name: str, kv_mode: str, search: dict[str, int]
) -> None:
    model = make_twins(name, kv_mode, adapters=("default", "polite")).model
    question = random_ids(5, seed=44)
    document = filled_by_base(model, PROMPT)
    before, clones = contents(document), [each.clone() for each in contents(document)]
    for weights in ({"default": 1.0}, {"polite": 1.0}, {"default": 1.0, "polite": -0.5}, {}):
        calls = {"adapters": weights, "max_new_tokens": 6, **search}
        found = generated(model, PROMPT + question, **calls, **{CACHE_NAME: document})
        assert found == generated(model, PROMPT + question, **calls)
    assert all(now is then for now, then in zip(contents(document), before, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(before, clones, strict=True))


@pytest.mark.parametrize("refusal", [None, "the test wants it so"], ids=["one pass", "two passes"])
def test_emptying_what_went_on_from_a_document_leaves_it_alone(refusal: str | None) -> None:
    model = make_twins("llama", "shared").model
    model.streams.one_pass_refusal, model.streams.is_checked = refusal, True
    document = filled_by_base(model, PROMPT)
    clones = [each.clone() for each in contents(document)]
    cache = with_cache(model, [*PROMPT, 5], 3, **{CACHE_NAME: document})[CACHE_NAME]
    cache.reset()
    assert cache.get_seq_length() == 0
    assert all(torch.equal(now, then) for now, then in zip(contents(document), clones, strict=True))


@pytest.mark.parametrize("kv_mode", ["prompt", "shared"])
def test_one_document_for_a_batch_of_questions(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    document = filled_by_base(model, PROMPT)
    questions = [PROMPT + random_ids(4, seed=seed) for seed in (45, 46, 47)]
    found = generated(model, *questions, max_new_tokens=6, **{CACHE_NAME: document})
    assert found == generated(model, *questions, max_new_tokens=6)
    assert document.layers[0].keys.shape[0] == 1


def test_a_document_in_several_rows() -> None:
    model = trained_twins("llama", "shared").model
    documents = filled_by_base(model, PROMPT, random_ids(9, seed=48))
    turns = [prompt + random_ids(3, seed=49) for prompt in (PROMPT, random_ids(9, seed=48))]
    found = generated(model, *turns, max_new_tokens=6, **{CACHE_NAME: documents})
    assert found == generated(model, *turns, max_new_tokens=6)
    with pytest.raises(ValueError, match="the cache holds 2 sequences, 3 are to be generated"):
        generated(model, *turns, PROMPT + random_ids(3, seed=50), **{CACHE_NAME: documents})


@each_mode
def test_an_empty_cache_is_a_fresh_one(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    for cache in (DynamicCache(), DynamicCache(config=model.get_base_model().config)):
        found = generated(model, *PROMPTS, max_new_tokens=5, **{CACHE_NAME: cache})
        assert found == generated(model, *PROMPTS, max_new_tokens=5)


def test_separate_mode_cannot_read_a_cache_of_the_base() -> None:
    model = trained_twins("llama", "separate").model
    with pytest.raises(ValueError, match="no K/V of the Q stream, which kv_mode='separate' needs"):
        generated(model, PROMPT + [5], **{CACHE_NAME: filled_by_base(model, PROMPT)})


def test_a_cache_that_holds_all_of_the_input_is_refused() -> None:
    model = trained_twins("llama", "shared").model
    for cached in (PROMPT, PROMPT + [7, 8]):
        with pytest.raises(ValueError, match=f"holds {len(cached)} tokens, the input has {len(PROMPT)}"):
            generated(model, PROMPT, **{CACHE_NAME: filled_by_base(model, cached)})


# --- what is kept -----------------------------------------------------------------------------------------------------


def kept_bytes(cache: Any) -> int:
    return sum(each.nbytes for each in contents(cache))


@pytest.mark.parametrize("kinds", [1, 2, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_shared_mode_keeps_what_the_base_keeps(name: str, kinds: int) -> None:
    adapters = ["default", *(f"adapter{number}" for number in range(1, kinds))]
    twins = make_twins(name, "shared", adapters=adapters)
    ours = with_cache(twins.model, PROMPT, 8, adapters=dict.fromkeys(adapters, 0.3))[CACHE_NAME]
    base = with_cache(twins.base, PROMPT, 8)[CACHE_NAME]
    assert kept_bytes(ours) == kept_bytes(base)
    assert [tensor.shape for tensor in contents(ours)] == [tensor.shape for tensor in contents(base)]


def test_prompt_mode_keeps_the_prompt_once() -> None:
    model = trained_twins("llama", "prompt").model
    cache = with_cache(model, PROMPT, 8)[CACHE_NAME]
    for layer in cache.layers:
        assert layer.prefix[0].shape[0] == 1 and layer.prefix[0].shape[2] == len(PROMPT) - 1
        assert layer.keys.shape[0] == 2 and layer.keys.shape[2] == 8


@pytest.mark.parametrize("kv_mode", ["separate", "prompt"])
def test_an_adapter_can_leave_in_the_middle(kv_mode: str) -> None:
    """Its rows are dropped; the other goes on from its own K/V, as if it had been alone from the start."""
    model = two_adapters(kv_mode).model
    first = with_cache(model, PROMPT, 4, adapters={"default": 1.0, "polite": 1.0})
    ids = first.sequences[0].tolist()
    rest = with_cache(model, ids, 3, adapters={"polite": 1.0}, output_logits=True, **{CACHE_NAME: first[CACHE_NAME]})
    assert rest[CACHE_NAME].adapters == ("polite",)
    assert {layer.keys.shape[0] for layer in rest[CACHE_NAME].layers} == {2}
    model.set_adapter("polite")
    try:
        alone = model(input_ids=torch.tensor([ids]), logits_to_keep=1 + 4).logits[0, -1]
    finally:
        model.set_adapter("default")
    torch.testing.assert_close(rest.logits[0][0], alone)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
@each_mode
def test_all_adapters_can_leave_in_the_middle(name: str, kv_mode: str) -> None:
    """Then the base goes on, on all that was said."""
    twins = trained_twins(name, kv_mode)
    first = with_cache(twins.model, PROMPT, 5)
    ids = first.sequences[0].tolist()
    rest = with_cache(twins.model, ids, 4, adapters={}, **{CACHE_NAME: first[CACHE_NAME]})
    assert rest.sequences.tolist() == with_cache(twins.base, ids, 4).sequences.tolist()


def test_a_prompt_answered_by_the_base_goes_on_with_an_adapter() -> None:
    """Nobody had K/V of its own yet, so all of it is the prompt, and one pass and two agree."""
    model = trained_twins("llama", "prompt").model
    results = []
    for refusal in (None, "the test wants it so"):
        model.streams.one_pass_refusal, model.streams.is_checked = refusal, True
        first = with_cache(model, PROMPT, 4, adapters={})
        ids = first.sequences[0].tolist()
        results.append(with_cache(model, ids, 4, **{CACHE_NAME: first[CACHE_NAME]}).sequences.tolist())
    model.streams.one_pass_refusal = None
    assert results[0] == results[1] == with_cache(model, ids, 4).sequences.tolist()


def cache_of(name: str, kv_mode: str) -> Any:
    return with_cache(trained_twins(name, kv_mode).model, PROMPT, 3)[CACHE_NAME]


@each_mode
def test_a_cache_of_another_call_is_checked(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    first = with_cache(model, PROMPT, 3)
    ids, cache = first.sequences[0].tolist(), first[CACHE_NAME]
    twice = r"the cache holds 1 sequences, 2 are to be generated: repeat them with its batch_repeat_interleave\(2\)"
    for more in ({"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match=twice):
            with_cache(model, ids, 3, **more, **{CACHE_NAME: cache})
    for adapters in ({}, {"default": 1.0}):
        with pytest.raises(ValueError, match=twice):
            generated(model, ids, ids, adapters=adapters, **{CACHE_NAME: cache})
    beams = with_cache(model, ids, 3, num_beams=2)
    cache.batch_repeat_interleave(2)
    found = with_cache(model, ids, 3, num_beams=2, **{CACHE_NAME: cache}).sequences.tolist()
    assert kv_mode == "prompt" or found == beams.sequences.tolist()  # there all of `ids` were the prompt of `beams`
    other = {"separate": "shared", "shared": "prompt", "prompt": "separate"}[kv_mode]
    with pytest.raises(ValueError, match=f"the cache is of kv_mode='{other}', this model runs '{kv_mode}'"):
        with_cache(
            model, ids, 3, **{CACHE_NAME: with_cache(trained_twins("llama", other).model, PROMPT, 3)[CACHE_NAME]}
        )
    with pytest.raises(ValueError, match="the cache has 4 layers, the model 3"):
        with_cache(
            model, ids, 3, **{CACHE_NAME: with_cache(trained_twins("gemma3", kv_mode).model, PROMPT, 3)[CACHE_NAME]}
        )


def test_a_mistake_leaves_the_cache_alone() -> None:
    model = trained_twins("llama", "shared").model
    first = with_cache(model, PROMPT, 3)
    ids, cache = first.sequences[0].tolist(), first[CACHE_NAME]
    with pytest.raises(ValueError, match="2 weights of one adapter for 1 sequences"):
        with_cache(model, ids, 3, adapters={"default": [1.0, 2.0]}, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="use_cache=False with a given"):
        with_cache(model, ids, 3, use_cache=False, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == len(ids) - 1
    static = with_cache(model, PROMPT, 3, cache_implementation="static")
    with pytest.raises(ValueError, match="static and holds 11 tokens, 14 are to be kept"):
        with_cache(model, static.sequences[0].tolist(), 3, **{CACHE_NAME: static[CACHE_NAME]})


@each_mode
def test_a_cache_can_be_emptied_and_copied(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    first = with_cache(model, PROMPT, 4)
    cache = copy.deepcopy(first[CACHE_NAME])
    cache.reset()
    assert cache.get_seq_length() == 0
    again = with_cache(model, PROMPT, 4, **{CACHE_NAME: cache})
    assert again.sequences.tolist() == first.sequences.tolist()


@torch.no_grad()
@each_mode
def test_batch_operations_on_a_cache(kv_mode: str) -> None:
    """As a search of the user's own would use them between forwards."""
    model = trained_twins("llama", kv_mode).model
    prompts = [PROMPT, random_ids(9, seed=51)]
    inputs = torch.tensor(prompts)
    one = model(input_ids=inputs, logits_to_keep=1)
    cache = one[CACHE_NAME]
    step = torch.tensor([[11], [12]])
    expected = model(input_ids=step, logits_to_keep=1, **{CACHE_NAME: copy.deepcopy(cache)}).logits
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    cache.batch_repeat_interleave(2)
    found = model(input_ids=step[[1, 1, 0, 0, 1, 1]], logits_to_keep=1, **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(found, expected[[1, 1, 0, 0, 1, 1]])
    cache.crop(-1)
    again = model(input_ids=step[[1, 1, 0, 0, 1, 1]], logits_to_keep=1, **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(again, found)


def test_the_prompt_cannot_be_cropped_away() -> None:
    cache = with_cache(trained_twins("llama", "prompt").model, PROMPT, 3)[CACHE_NAME]
    with pytest.raises(ValueError, match="cannot take back 4 tokens: only 3 are not of the prompt"):
        cache.crop(-4)
