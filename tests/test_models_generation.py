"""Generation is transformers' own search over the customised policy, which is computed by hand in `references.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)
from transformers.generation.streamers import BaseStreamer

import fastqadapter as fqa
from fastqadapter.testing import assert_close_to_truth
from generation_cases import (
    CLOSE,
    NUMBERS,
    PROMPT,
    PROMPTS,
    by_hand,
    each_mode,
    each_name,
    generated,
    hand_logits,
    ids_of,
    in_float64,
    trained_twins,
    two_adapters,
)
from references import CACHE_NAME
from tiny import PAD, VOCABULARY, make_twins

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


@each_mode
def test_a_logits_head_with_weight_0(kv_mode: str) -> None:
    """Nothing of the adapter is left: the base at these alphas."""
    twins = make_twins("llama", kv_mode, q_head="logits", **NUMBERS)
    found = twins.model(**ids_of(PROMPT), logits_to_keep=1, adapters={"default": 0.0}).logits[0, -1]
    base = twins.base(**ids_of(PROMPT)).logits[0, -1]
    expected = base * (NUMBERS["alpha_0"] / NUMBERS["alpha_tilde"])
    torch.testing.assert_close(found.log_softmax(dim=-1), expected.log_softmax(dim=-1), **CLOSE)


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


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
@each_mode
def test_weights_of_each_row(kv_mode: str, search: dict[str, Any]) -> None:
    """Different requests of one batch use different mixtures; beams and further sequences share their prompt's."""
    model = two_adapters(kv_mode).model
    mixtures = [(1.0, 0.0), (0.0, -0.5), (0.7, 1.5)]
    several = search.get("num_return_sequences", 1)
    default, polite = ([mixture[index] for mixture in mixtures] for index in (0, 1))
    for weights in (
        {"default": default, "polite": torch.tensor(polite)},
        {"polite": tuple(polite), "default": default},
    ):
        found = generated(model, *PROMPTS, adapters=weights, max_new_tokens=7, **search)
        for index, (prompt, mixture) in enumerate(zip(PROMPTS, mixtures, strict=True)):
            alone = dict(zip(("default", "polite"), mixture, strict=True))
            expected = generated(model, prompt, adapters=alone, max_new_tokens=7, **search)
            assert found[index * several : (index + 1) * several] == expected


def test_one_weight_for_all_and_one_for_each() -> None:
    model = two_adapters("shared").model
    found = generated(model, *PROMPTS, adapters={"default": 0.5, "polite": [1.0, 1.0, 1.0]}, max_new_tokens=5)
    assert found == generated(model, *PROMPTS, adapters={"default": 0.5, "polite": 1.0}, max_new_tokens=5)
    for several in (np.ones(3), np.float32([1, 1, 1]).tolist(), torch.ones(3)):
        weights = {"default": np.float32(0.5), "polite": several}
        assert generated(model, *PROMPTS, adapters=weights, max_new_tokens=5) == found
    with pytest.raises(ValueError, match="2 weights of one adapter for 4 sequences"):
        generated(model, *PROMPTS, PROMPT, adapters={"default": [1.0, 0.0]}, max_new_tokens=5)
    with pytest.raises(ValueError, match="as many weights for one as for another"):
        generated(model, *PROMPTS, adapters={"default": [1.0, 2.0], "polite": [1.0, 1.0, 1.0]})


@pytest.mark.parametrize("weight", [0.0, [0.0, 0.0, 0.0], torch.zeros(3), -0.0])
@each_mode
def test_weight_zero_gives_the_logits_of_the_base(kv_mode: str, weight: Any) -> None:
    """With alpha_0 = alpha_tilde = 1; bit for bit where the weight is one number, as nothing but the base is run."""
    twins = two_adapters(kv_mode)
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    kwargs |= {"return_dict_in_generate": True, "output_logits": True}
    ours = twins.model.generate(**ids_of(*PROMPTS), adapters={"default": weight}, **kwargs)
    base = twins.base.generate(**ids_of(*PROMPTS), **kwargs)
    exact = {} if isinstance(weight, float) else CLOSE
    assert ours.sequences.tolist() == base.sequences.tolist()
    if isinstance(weight, float):
        twins.base.set_attn_implementation(twins.model.get_base_model().config._attn_implementation)
        base = twins.base.generate(**ids_of(*PROMPTS), **kwargs)
        twins.base.set_attn_implementation("eager")
        exact = {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(base.logits), **exact)


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
