"""The peers of the decoding benchmark compute what `separate` mode does, by other means."""

from __future__ import annotations

import pytest
import torch

from fastqadapter_benchmarks.peers.decode import MixedBatch, TwoPasses
from generation_cases import NUMBERS, PROMPT, generated, ids_of, trained_twins
from tiny import PAD


@pytest.mark.parametrize("two_models", [False, True], ids=["switched", "two models"])
def test_two_passes_within_generate(two_models: bool) -> None:
    twins = trained_twins("llama", "separate")
    expected = generated(twins.model, PROMPT, max_new_tokens=12)
    passes = TwoPasses(twins.adapted, **NUMBERS, base=twins.base if two_models else None)
    found = passes.generate(**ids_of(PROMPT), max_new_tokens=12, do_sample=False, pad_token_id=PAD)
    assert found[:, len(PROMPT) :].tolist() == expected


@torch.no_grad()
def test_mixed_batch() -> None:
    twins = trained_twins("llama", "separate")
    expected = generated(twins.model, PROMPT, max_new_tokens=12)[0]
    stepper, tokens, found = MixedBatch(twins.adapted, **NUMBERS), torch.tensor([PROMPT]), []
    for _ in range(12):
        tokens = stepper.step(tokens).argmax(dim=-1, keepdim=True)
        found.append(tokens.item())
    assert found == expected
