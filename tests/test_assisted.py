"""Assisted decoding of the customised policy: an assistant, or the prompt itself, proposes k tokens, and one pass over
all streams verifies them. Greedy output stays the same token for token, and samples keep their distribution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fastqadapter.models.one_pass import OnePass
from generation_cases import PROMPT, each_mode, each_name, generated, hand_logits, trained_twins, two_adapters
from references import CACHE_NAME
from tiny import MODES, Twins, make_twins, tiny_base

PROMPT_TO_LOOK_UP = PROMPT + PROMPT[:5]  # with n-grams to find


def assistant() -> PreTrainedModel:
    """Another small model of the same vocabulary."""
    return tiny_base("llama", seed=5)


def own_base(twins: Twins) -> PreTrainedModel:
    """The base. Not where its layers slide and transformers is before 5.24, which fails with such an assistant."""
    slides = getattr(twins.base.config, "sliding_window", None) is not None
    return assistant() if slides and CACHE_NAME == "past_key_values" else twins.base


ASSISTANCE: dict[str, Any] = {
    "prompt lookup": lambda twins: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda twins: {"assistant_model": assistant()},
    "the base itself": lambda twins: {"assistant_model": own_base(twins)},  # proposes much of what the policy accepts
}


@pytest.mark.parametrize("kind", ASSISTANCE)
@each_mode
@each_name
def test_greedy_output_is_the_same(name: str, kv_mode: str, kind: str) -> None:
    twins = trained_twins(name, kv_mode)
    expected = generated(twins.model, PROMPT_TO_LOOK_UP, max_new_tokens=20)
    found = generated(twins.model, PROMPT_TO_LOOK_UP, max_new_tokens=20, **ASSISTANCE[kind](twins))
    assert found == expected


@pytest.mark.parametrize("length", [1, 2])
@each_mode
def test_short_prompts(kv_mode: str, length: int) -> None:
    twins = trained_twins("llama", kv_mode)
    expected = generated(twins.model, PROMPT[:length], max_new_tokens=12)
    assert generated(twins.model, PROMPT[:length], max_new_tokens=12, assistant_model=twins.base) == expected


@each_mode
def test_a_mixture_and_its_dials(kv_mode: str) -> None:
    twins = two_adapters(kv_mode)
    dials = {"adapters": {"default": 1.2, "polite": -0.7}, "alpha_0": 0.8, "alpha_tilde": 1.1, "max_new_tokens": 16}
    expected = generated(twins.model, PROMPT_TO_LOOK_UP, **dials)
    assert generated(twins.model, PROMPT_TO_LOOK_UP, assistant_model=twins.base, **dials) == expected
    assert generated(twins.model, PROMPT_TO_LOOK_UP, prompt_lookup_num_tokens=2, **dials) == expected


@each_mode
def test_candidates_are_verified_in_one_pass(kv_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer passes than tokens, each over the rows of both streams."""
    twins = trained_twins("llama", kv_mode)
    helper = copy.deepcopy(twins.base)
    helper.generation_config.assistant_confidence_threshold = 0.0
    helper.generation_config.num_assistant_tokens = 4
    generated(twins.model, PROMPT, max_new_tokens=2)  # the trial of the first call
    passes = []
    run = OnePass._run

    def count(self: OnePass, step: Any, cache: Any, adapters: tuple[str, ...]) -> torch.Tensor:
        passes.append((step.length, len(adapters)))
        return run(self, step, cache, adapters)

    monkeypatch.setattr(OnePass, "_run", count)
    # With alpha_0 far above the adapter's weight the policy is nearly the base's, so most proposals are accepted.
    dials = {"alpha_0": 50.0, "alpha_tilde": 50.0, "max_new_tokens": 20}
    generated(twins.model, PROMPT, assistant_model=helper, **dials)
    verifying = [length for length, adapters in passes if adapters == 1]
    assert len(verifying) < 10 and 5 in verifying
    assert sum(adapters == 0 for _, adapters in passes) == (kv_mode != "separate")  # the prompt


def probabilities_of_pairs(twins: Twins, prompt: list[int], **dials: float) -> torch.Tensor:
    """(V, V) of the two tokens behind the prompt."""
    first = hand_logits(twins, prompt, len(prompt), **dials).exp()
    second = [hand_logits(twins, [*prompt, token], len(prompt), **dials).exp() for token in range(len(first))]
    return first[:, None] * torch.stack(second)


def chi_square(counts: torch.Tensor, draws: int, probabilities: torch.Tensor) -> float:
    return ((counts - draws * probabilities).square() / (draws * probabilities)).sum().item()


@pytest.mark.parametrize(("kv_mode", "kind"), [*((mode, "the base itself") for mode in MODES), ("shared", "assistant")])
def test_samples_keep_their_distribution(kv_mode: str, kind: str) -> None:
    """Chi-square of pairs of tokens against the exact probabilities, on a vocabulary of five.

    24 degrees of freedom: the statistic exceeds 51.2 with probability 0.001 where the sampler is right.
    """
    size, draws = 5, 700
    settings = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    twins = make_twins("llama", kv_mode, base_settings=settings, alpha_0=0.6, alpha_tilde=1.4)
    helper = twins.base if kind == "the base itself" else tiny_base("llama", seed=5, **settings)
    prompt = [3, 1, 4]
    expected = probabilities_of_pairs(twins, prompt, alpha_0=0.6, alpha_tilde=1.4)
    assert expected.sum().item() == pytest.approx(1.0, abs=1e-5)
    counts = torch.zeros(size, size)
    torch.manual_seed(11)
    for _ in range(draws):
        # Three tokens, so that the first two can both be proposed and accepted.
        tokens = generated(twins.model, prompt, max_new_tokens=3, do_sample=True, top_k=0, assistant_model=helper)[0]
        counts[tokens[0], tokens[1]] += 1
    assert chi_square(counts, draws, expected) < 51.2, (counts, draws * expected)
    # The test can tell the policy from that of another alpha_0.
    assert chi_square(counts, draws, probabilities_of_pairs(twins, prompt, alpha_0=1.5, alpha_tilde=1.4)) > 51.2
