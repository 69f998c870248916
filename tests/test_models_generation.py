"""Generation is transformers' own search over the customised policy, which is computed by hand in `references.py`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.streamers import BaseStreamer

import fastqadapter as fqa
from fastqadapter.testing import assert_close_to_truth
from references import CACHE_NAME, hand_policy, policy_logits
from tiny import ARCHITECTURES, MODES, PAD, PAIRS, VOCABULARY, Twins, lora_config, make_twins, packed, random_ids

CLOSE = {"atol": 2e-5, "rtol": 0.0}
NUMBERS = {"alpha_0": 0.4, "alpha_tilde": 1.3}
PROMPT = random_ids(9, seed=40)
PROMPTS = [PROMPT, random_ids(3, seed=41), random_ids(1, seed=42)]
each_mode = pytest.mark.parametrize("kv_mode", MODES)
each_name = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.lru_cache(maxsize=3)
def trained_twins(name: str, kv_mode: str) -> Twins:
    return make_twins(name, kv_mode, **NUMBERS)


@functools.lru_cache(maxsize=3)
def two_adapters(kv_mode: str) -> Twins:
    return make_twins("llama", kv_mode, adapters=("default", "polite"))


def ids_of(*rows: list[int]) -> dict[str, Tensor]:
    """Left-padded model inputs."""
    width = max(map(len, rows))
    padded = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def hand_logits(
    twins: Twins, ids: list[int], prompt_length: int, weights: Mapping[str, float] | None = None, **dials: Any
) -> Tensor:
    """Log-probabilities of the customised policy after `ids`, from scratch."""
    adapted = []
    for adapter, weight in (weights or {"default": 1.0}).items():
        adapted.append((weight, functools.partial(run_adapter, twins.adapted, adapter)))
    return policy_logits(twins.base, adapted, ids, prompt_length, twins.kv_mode, **{**NUMBERS, **dials})


def in_float64(base: PreTrainedModel) -> PreTrainedModel:
    """The same model in float64; torch's grouped products of experts have none."""
    exact = copy.deepcopy(base).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")
    return exact


def run_adapter(model: PeftModel, adapter: str, **inputs: Any) -> Any:
    model.set_adapter(adapter)
    return model(**inputs)


def by_hand(twins: Twins, prompt_width: int, **dials: Any) -> Any:
    """The hand-combined policy as a causal LM, for transformers' own search."""
    return hand_policy(twins.base, functools.partial(hand_logits, twins, **dials), prompt_width)


def generated(model: Any, *prompts: list[int], **kwargs: Any) -> list[list[int]]:
    """New tokens of each returned sequence."""
    inputs = ids_of(*prompts)
    sequences = model.generate(**inputs, **{"do_sample": False, "pad_token_id": PAD, **kwargs})
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


# --- greedy search ----------------------------------------------------------------------------------------------------


@each_mode
@each_name
def test_greedy_equals_the_argmax_of_hand_combined_logits(name: str, kv_mode: str) -> None:
    steps = 64 if name in ("llama", "gemma2", "gemma3") else 16
    twins = trained_twins(name, kv_mode)
    output = twins.model.generate(
        **ids_of(PROMPT),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = output.sequences[0].tolist()
    assert len(ids) == len(PROMPT) + steps and len(output.logits) == steps
    for step, logits in enumerate(output.logits):
        expected = hand_logits(twins, ids[: len(PROMPT) + step], len(PROMPT))
        assert ids[len(PROMPT) + step] == expected.argmax().item(), step
        torch.testing.assert_close(torch.log_softmax(logits[0], dim=-1), expected, **CLOSE)
    assert len(set(ids[len(PROMPT) :])) > 5  # no fixed point, which would prove little
    assert ids[len(PROMPT) :] != generated(twins.adapted, PROMPT, max_new_tokens=steps)[0]  # not the plain adapter


@each_mode
@each_name
def test_left_padded_batch_equals_single_runs(name: str, kv_mode: str) -> None:
    model = trained_twins(name, kv_mode).model
    batch = generated(model, *PROMPTS, max_new_tokens=12)
    assert batch == [generated(model, prompt, max_new_tokens=12)[0] for prompt in PROMPTS]


@each_mode
@each_name
def test_untrained_adapter_is_the_base_model(name: str, kv_mode: str) -> None:
    twins = make_twins(name, kv_mode, trained=False)
    kwargs: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": PAD, "return_dict_in_generate": True}
    kwargs |= {"output_logits": True, "do_sample": False}
    models = twins.model, twins.base, in_float64(twins.base)
    for prompt in PROMPTS:
        outputs = [each.generate(**ids_of(prompt), **kwargs) for each in models]
        assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist() == outputs[2].sequences.tolist()
        ours, base, truth = (torch.stack(output.logits) for output in outputs)
        assert_close_to_truth(ours, base, truth.double(), name=name)
    assert generated(twins.model, *PROMPTS, max_new_tokens=12) == generated(twins.base, *PROMPTS, max_new_tokens=12)
    # The logits are those of the base, not only their softmax: a repetition penalty can tell.
    kwargs = {"max_new_tokens": 8, "repetition_penalty": 1.5}
    assert generated(twins.model, PROMPT, **kwargs) == generated(twins.base, PROMPT, **kwargs)


@pytest.mark.parametrize("q_head", ["difference", "logits"])
@each_mode
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])
def test_both_q_heads(name: str, kv_mode: str, q_head: str) -> None:
    """Soft-cap, logit scale and head bias enter the two heads differently."""
    twins = make_twins(name, kv_mode, q_head=q_head, **NUMBERS)
    logits = twins.model(**ids_of(PROMPT), logits_to_keep=1).logits[0, -1]
    expected = hand_logits(twins, PROMPT, len(PROMPT), q_head=q_head)
    torch.testing.assert_close(torch.log_softmax(logits, dim=-1), expected, **CLOSE)


# --- transformers' searches -------------------------------------------------------------------------------------------


class Ban(LogitsProcessor):
    """Forbids even tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 0, -torch.inf)


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "top_k, temperature": {"do_sample": True, "top_k": 5, "temperature": 1.7},
    "top_p, several": {"do_sample": True, "top_k": 0, "top_p": 0.8, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams, all": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5, "eos_token_id": [5, 17, 80]},
    "beams, sampling": {"num_beams": 2, "do_sample": True},
    "no repetition": {"no_repeat_ngram_size": 1},
    "processor": {"logits_processor": LogitsProcessorList([Ban()])},
    "end of sequence": {"eos_token_id": list(range(3, 30)), "min_new_tokens": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@each_mode
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_search_equals_the_same_search_over_hand_combined_logits(name: str, kv_mode: str, strategy: str) -> None:
    twins = trained_twins(name, kv_mode)
    kwargs = {"max_new_tokens": 7, **STRATEGIES[strategy]}
    results = []
    for model, caching in ((twins.model, {}), (by_hand(twins, len(PROMPT)), {"use_cache": False})):
        torch.manual_seed(3)
        results.append(generated(model, *PROMPTS[:2], **kwargs, **caching))
    assert results[0] == results[1]


@each_mode
def test_top_k_and_seed(kv_mode: str) -> None:
    twins = trained_twins("llama", kv_mode)
    best = set(hand_logits(twins, PROMPT, len(PROMPT)).topk(4).indices.tolist())
    kwargs: dict[str, Any] = {"do_sample": True, "top_k": 4, "max_new_tokens": 1, "num_return_sequences": 40}
    torch.manual_seed(0)
    first = generated(twins.model, PROMPT, **kwargs)
    torch.manual_seed(0)
    assert generated(twins.model, PROMPT, **kwargs) == first
    drawn = {row[0] for row in first}
    assert drawn <= best and len(drawn) > 1


@each_mode
def test_scores_of_the_output(kv_mode: str) -> None:
    twins = trained_twins("llama", kv_mode)
    output = twins.model.generate(
        **ids_of(PROMPT),
        do_sample=False,
        max_new_tokens=3,
        pad_token_id=PAD,
        logits_processor=LogitsProcessorList([Ban()]),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert len(output.scores) == len(output.logits) == 3
    assert output.scores[0].shape == (1, VOCABULARY) and output.scores[0].dtype == torch.float32
    torch.testing.assert_close(output.scores[0], Ban()(None, output.logits[0]))
    transition = twins.model.get_base_model().compute_transition_scores(
        output.sequences, output.logits, normalize_logits=True
    )
    expected = hand_logits(twins, PROMPT, len(PROMPT))[output.sequences[0, len(PROMPT)]]
    torch.testing.assert_close(transition[0, 0], expected, **CLOSE)


@each_mode
def test_end_of_sequence_and_padding(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    free = generated(model, *PROMPTS, max_new_tokens=10)
    end = free[0][4]
    stop = [row.index(end) + 1 if end in row else 10 for row in free]
    ended = generated(model, *PROMPTS, max_new_tokens=10, eos_token_id=end)
    width = max(stop)
    assert ended == [(row[:length] + [PAD] * width)[:width] for row, length in zip(free, stop, strict=True)]


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@each_mode
def test_streamer(kv_mode: str) -> None:
    model, streamer = trained_twins("llama", kv_mode).model, Collect()
    tokens = generated(model, PROMPT, max_new_tokens=6, streamer=streamer)
    assert streamer.tokens == PROMPT + tokens[0] and streamer.ended


@each_mode
def test_stop_strings(kv_mode: str) -> None:
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCABULARY])}
    bpe = Tokenizer(models.BPE(letters, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    model = trained_twins("llama", kv_mode).model
    free = generated(model, PROMPT, max_new_tokens=8)[0]
    text = tokenizer.decode(free[2:4])
    stopped = generated(model, PROMPT, max_new_tokens=8, stop_strings=[text], tokenizer=tokenizer)[0]
    assert stopped == free[:4]


@each_mode
def test_generation_config_object(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    config = GenerationConfig(max_new_tokens=5, num_beams=2, do_sample=False, pad_token_id=PAD)
    inputs = ids_of(PROMPT)
    expected = generated(model, PROMPT, max_new_tokens=5, num_beams=2)
    assert model.generate(**inputs, generation_config=config)[:, len(PROMPT) :].tolist() == expected
    assert model.generate(inputs["input_ids"], config)[:, len(PROMPT) :].tolist() == expected  # positional


# --- the dials --------------------------------------------------------------------------------------------------------


def first_logits(model: fqa.QAdapterModel, **dials: Any) -> Tensor:
    output = model.generate(
        **ids_of(PROMPT),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
        **dials,
    )
    return output.logits[0][0]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@each_mode
def test_alphas_per_call(name: str, kv_mode: str) -> None:
    twins = trained_twins(name, kv_mode)
    for dials in ({}, {"alpha_0": 0.0}, {"alpha_0": 3.5}, {"alpha_tilde": 0.2}, {"alpha_0": 2.0, "alpha_tilde": 5.0}):
        log_policy = torch.log_softmax(first_logits(twins.model, **dials), dim=-1)
        expected = hand_logits(twins, PROMPT, len(PROMPT), **dials)
        torch.testing.assert_close(log_policy, expected, atol=1e-4, rtol=0.0)
    one, two = (first_logits(twins.model, alpha_tilde=value) for value in (1.0, 2.0))
    torch.testing.assert_close(two, one / 2, rtol=1e-6, atol=1e-7)
    assert twins.model.qadapter_config.alpha_tilde == NUMBERS["alpha_tilde"]  # a dial of one call


@each_mode
def test_alpha_tilde_is_a_temperature(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    samples = []
    for dials in ({"alpha_tilde": 2.0}, {"alpha_tilde": 1.0, "temperature": 2.0}):
        torch.manual_seed(5)
        samples.append(generated(model, *PROMPTS, do_sample=True, max_new_tokens=8, **dials))
    assert samples[0] == samples[1]


@pytest.mark.parametrize(
    "weights", [{"default": 0.5}, {"polite": -0.7}, {"default": 1.0, "polite": 0.5}, {"default": 0.0, "polite": 2.0}]
)
@each_mode
def test_adapters_compose(kv_mode: str, weights: dict[str, float]) -> None:
    twins = two_adapters(kv_mode)
    hand = by_hand(twins, len(PROMPT), weights=weights, alpha_0=0.8, alpha_tilde=1.1)
    dials = {"adapters": weights, "alpha_0": 0.8, "alpha_tilde": 1.1}
    for strategy in ({}, {"num_beams": 2}):
        ours = generated(twins.model, *PROMPTS[:2], max_new_tokens=6, **strategy, **dials)
        assert ours == generated(hand, *PROMPTS[:2], max_new_tokens=6, use_cache=False, **strategy)
    log_policy = torch.log_softmax(first_logits(twins.model, **dials), dim=-1)
    expected = hand_logits(twins, PROMPT, len(PROMPT), weights, alpha_0=0.8, alpha_tilde=1.1)
    torch.testing.assert_close(log_policy, expected, **CLOSE)


@pytest.mark.parametrize("weights", [{}, {"default": 0.0}, {"default": 0.0, "polite": 0.0}])
@each_mode
def test_weight_zero_is_the_base_policy(kv_mode: str, weights: dict[str, float]) -> None:
    twins = two_adapters(kv_mode)
    assert generated(twins.model, *PROMPTS, adapters=weights, max_new_tokens=8) == generated(
        twins.base, *PROMPTS, max_new_tokens=8
    )


@each_mode
def test_the_active_adapter_is_the_default(kv_mode: str) -> None:
    twins = two_adapters(kv_mode)
    named = generated(twins.model, *PROMPTS, adapters={"polite": 1.0}, max_new_tokens=8)
    assert named != generated(twins.model, *PROMPTS, max_new_tokens=8)
    twins.model.set_adapter("polite")
    try:
        assert generated(twins.model, *PROMPTS, max_new_tokens=8) == named
    finally:
        twins.model.set_adapter("default")


# --- logits of the forward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_mode", ["separate", "shared"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_forward_gives_the_policy_at_every_token(name: str, kv_mode: str) -> None:
    twins = trained_twins(name, kv_mode)
    logits = twins.model(**ids_of(PROMPT)).logits
    assert logits.shape == (1, len(PROMPT), VOCABULARY)
    expected = torch.stack([hand_logits(twins, PROMPT[: end + 1], end + 1) for end in range(len(PROMPT))])
    torch.testing.assert_close(torch.log_softmax(logits[0], dim=-1), expected, **CLOSE)
    inputs = ids_of(PROMPT)
    for keep, rows in ((3, slice(-3, None)), (torch.tensor([0, 4, 8]), [0, 4, 8])):
        some = twins.model(**inputs, logits_to_keep=keep).logits
        torch.testing.assert_close(some[0], logits[0, rows], **CLOSE)
    torch.testing.assert_close(twins.model(inputs["input_ids"]).logits, logits)  # positional
    torch.testing.assert_close(twins.model(**inputs, use_cache=False).logits, logits)


@each_mode
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_forward_step_by_step_with_its_own_cache(name: str, kv_mode: str) -> None:
    twins = trained_twins(name, kv_mode)
    cache, start = None, 0
    for stop in range(4, len(PROMPT) + 1):
        tokens = torch.tensor([PROMPT[start:stop]])
        output = twins.model(input_ids=tokens, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        cache, start = output[CACHE_NAME], stop
        expected = hand_logits(twins, PROMPT[:stop], 4)
        torch.testing.assert_close(torch.log_softmax(output.logits[0, -1], dim=-1), expected, **CLOSE)


@each_mode
def test_forward_in_training_mode_with_checkpointing(kv_mode: str) -> None:
    """A plain model in training mode with gradient checkpointing gives the right logits from `model(input_ids)`."""
    model = make_twins("llama", kv_mode).model
    expected = model(**ids_of(PROMPT), logits_to_keep=1).logits
    model.train()
    model.base_model.model.gradient_checkpointing_enable()
    torch.testing.assert_close(model(**ids_of(PROMPT), logits_to_keep=1).logits, expected)


@each_mode
def test_gradient_of_the_forward_reaches_the_adapter_alone(kv_mode: str) -> None:
    model = make_twins("llama", kv_mode).model
    model(**ids_of(PROMPT), logits_to_keep=1).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) <= ("lora_" in name), name
    assert any(parameter.grad is not None for parameter in model.parameters())


# --- caches -----------------------------------------------------------------------------------------------------------


def with_cache(model: fqa.QAdapterModel, ids: list[int], steps: int, **kwargs: Any) -> Any:
    inputs = torch.tensor([ids])
    return model.generate(
        inputs, max_new_tokens=steps, do_sample=False, pad_token_id=PAD, return_dict_in_generate=True, **kwargs
    )


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


# --- what others do to a model ----------------------------------------------------------------------------------------


@each_mode
def test_device_hooks_do_not_bring_back_the_plain_adapter(kv_mode: str) -> None:
    """accelerate sets `forward` on the instance (`device_map` over several devices), where it shadows the class's."""
    expected = generated(trained_twins("llama", kv_mode).model, *PROMPTS, max_new_tokens=6)
    model = make_twins("llama", kv_mode, **NUMBERS).model
    dispatch_model(model.get_base_model(), {"": "cpu"}, force_hooks=True)
    hooked = model.get_base_model().__dict__["forward"]
    assert generated(model, *PROMPTS, max_new_tokens=6) == expected
    assert model.get_base_model().__dict__["forward"] is hooked


@each_mode
def test_disable_adapter_is_the_base_model(kv_mode: str) -> None:
    twins = make_twins("llama", kv_mode, **NUMBERS)
    customised = generated(twins.model, PROMPT, max_new_tokens=6)
    with twins.model.disable_adapter():
        assert generated(twins.model, PROMPT, max_new_tokens=6) == generated(twins.base, PROMPT, max_new_tokens=6)
        with pytest.raises(ValueError, match="disable_adapter"):
            twins.model(packed(PAIRS, twins.model))
    assert generated(twins.model, PROMPT, max_new_tokens=6) == customised


def test_one_adapter_brings_its_own_alphas() -> None:
    twins = two_adapters("shared")
    model = twins.model
    own = dataclasses.replace(model.qadapter_configs["polite"], alpha_0=0.3, alpha_tilde=1.7)
    active = model.qadapter_configs["default"]
    try:
        model.qadapter_configs["polite"] = own
        inputs = {"adapters": {"polite": 1.0}, "max_new_tokens": 8}
        named = generated(model, PROMPT, **inputs)
        assert named == generated(model, PROMPT, alpha_0=0.3, alpha_tilde=1.7, **inputs)
        policy = model._policy(None, None, {"polite": 1.0, "default": 1.0})
        assert (policy.dials.alpha_0, policy.dials.alpha_tilde) == (active.alpha_0, active.alpha_tilde)
    finally:
        model.qadapter_configs["polite"] = active


@each_mode
def test_threads_do_not_mix_their_policies(kv_mode: str) -> None:
    """Streams switch adapters on the modules themselves: one thread at a time."""
    model = two_adapters(kv_mode).model
    mixtures = [{"default": 1.0}, {"polite": 1.0}, {"default": 0.0}]
    expected = [generated(model, PROMPT, max_new_tokens=5, adapters=weights) for weights in mixtures]
    assert len({str(answer) for answer in expected}) == 3
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(lambda weights: generated(model, PROMPT, max_new_tokens=5, adapters=weights), mixtures * 4)
        )
    assert found == expected * 4


def test_training_and_generating_in_two_threads() -> None:
    """Under gradient checkpointing the backward pass runs layers again, and switches adapters to do so."""
    model = make_twins("llama", "shared").model.train()
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = generated(model, PROMPT, max_new_tokens=5)

    def train() -> None:
        for _ in range(15):
            model(packed(PAIRS, model)).loss.backward()
            model.hidden_states(packed(PAIRS, model))

    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(train)
        while not training.done():
            assert generated(model, PROMPT, max_new_tokens=5) == expected
        training.result()


# --- nothing is left behind -------------------------------------------------------------------------------------------


class Interruption(Exception):
    pass


class Interrupt(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise Interruption


@each_mode
def test_the_base_model_is_itself_again(kv_mode: str) -> None:
    twins = make_twins("llama", kv_mode)
    model, inner = twins.model, twins.model.get_base_model()
    cls, attributes = type(inner), set(inner.__dict__)
    flags = [(layer._disable_adapters, layer._active_adapter) for layer in model.streams.tuner_layers]
    loss = model(packed(PAIRS, model)).loss
    expected = generated(model, PROMPT, max_new_tokens=4)
    calls: list[Callable[[], Any]] = [
        lambda: generated(model, PROMPT, max_new_tokens=2, num_beams=2),
        lambda: generated(model, PROMPT, max_new_tokens=2, logits_processor=LogitsProcessorList([Interrupt()])),
        lambda: model(**ids_of(PROMPT), logits_to_keep=1),
        lambda: model(**ids_of(PROMPT), labels=torch.tensor([PROMPT])),
    ]
    for call in calls:
        with contextlib.suppress(Interruption, ValueError):
            call()
        assert type(inner) is cls and set(inner.__dict__) == attributes
        assert [(layer._disable_adapters, layer._active_adapter) for layer in model.streams.tuner_layers] == flags
        assert torch.is_grad_enabled()
    assert generated(model, PROMPT, max_new_tokens=4) == expected
    loss.backward()  # generating between forward and backward does no harm
    assert torch.equal(model(packed(PAIRS, model)).loss, loss)
    assert inner(**ids_of(PROMPT)).logits.requires_grad  # PEFT's own view of the inner model is untouched


@each_mode
def test_the_policy_can_be_asked_while_generating(kv_mode: str) -> None:
    """A logits processor or a callback may look at the policy itself."""
    model = trained_twins("llama", kv_mode).model
    seen = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(model(input_ids=torch.tensor([PROMPT]), logits_to_keep=1).logits)
            return scores

    expected = generated(model, PROMPT, max_new_tokens=4)
    assert generated(model, PROMPT, max_new_tokens=4, logits_processor=LogitsProcessorList([Look()])) == expected
    assert len(seen) == 4


def test_a_model_wrapped_in_train_mode_generates_alike() -> None:
    model = make_twins("llama", "shared", lora={"lora_dropout": 0.5}).model
    expected = generated(model, *PROMPTS, max_new_tokens=6)
    model.train()
    model.eval()
    assert generated(model, *PROMPTS, max_new_tokens=6) == expected


@each_mode
def test_bfloat16(kv_mode: str) -> None:
    """Logits of a bfloat16 base are bfloat16, near those of float32; generation runs."""
    exact = trained_twins("llama", kv_mode).model
    model = fqa.get_qadapter_model(
        make_twins("llama", kv_mode).base.to(torch.bfloat16),
        fqa.QAdapterConfig(kv_mode=kv_mode, **NUMBERS),
        lora_config("llama", kv_mode),
    ).eval()
    with torch.no_grad():
        state = {name: parameter for name, parameter in exact.named_parameters() if "lora_" in name}
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(state[name])
        ours, expected = (each(**ids_of(PROMPT), logits_to_keep=1).logits.float() for each in (model, exact))
    assert torch.nn.functional.cosine_similarity(ours.flatten(), expected.flatten(), dim=0).item() > 0.99
    assert len(generated(model, *PROMPTS, max_new_tokens=5)[0]) == 5
