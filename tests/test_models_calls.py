"""What surrounds a call: hooks, threads, callbacks, training mode; and nothing is left behind."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import fastqadapter as fqa
from generation_cases import NUMBERS, PROMPT, PROMPTS, each_mode, generated, ids_of, trained_twins, two_adapters
from tiny import PAD, PAIRS, lora_config, lora_parameters, make_twins, packed, randomise_adapter

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


@each_mode
@pytest.mark.parametrize("layers", [None, [1, 2]], ids=["all", "above a trunk"])
def test_one_base_pass_serves_several_adapters(
    kv_mode: str, layers: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"layers_to_transform": layers}
    model = make_twins("llama", kv_mode, adapters=("default", "polite"), lora=lora).model.eval()
    batch, streams, passes = packed(PAIRS, model), model.streams, []
    apart = [streams.packed_hidden_states(batch, name) for name in ("default", "polite")]
    run = streams._run
    monkeypatch.setattr(streams, "_run", lambda *args: passes.append(1) or run(*args))
    hidden_b, hidden_qs = streams.stream_states(batch, ("default", "polite"))
    assert len(passes) == 3
    for hidden_q, (alone, base) in zip(hidden_qs, apart, strict=True):
        assert torch.equal(hidden_q, alone) and torch.equal(hidden_b, base)
    assert torch.equal(streams.stream_states(batch, ())[0], hidden_b) and len(passes) == 4


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


# --- what PEFT's model offers besides ---------------------------------------------------------------------------------


def test_continuous_batching_is_refused() -> None:
    """It would sample from the plain adapter."""
    model = trained_twins("llama", "shared").model
    for call in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        with pytest.raises(ValueError, match="would sample from the plain adapter"):
            call([PROMPT])


@each_mode
def test_disabled_adapter_layers_are_the_base(kv_mode: str) -> None:
    twins = make_twins("llama", kv_mode)
    twins.model.base_model.disable_adapter_layers()
    assert generated(twins.model, PROMPT, max_new_tokens=5) == generated(twins.base, PROMPT, max_new_tokens=5)
    twins.model.base_model.enable_adapter_layers()
    assert generated(twins.model, PROMPT, max_new_tokens=5) == generated(
        trained_twins("llama", kv_mode).model, PROMPT, max_new_tokens=5, alpha_0=1.0, alpha_tilde=1.0
    )


def test_a_generation_config_set_on_the_model() -> None:
    model = make_twins("llama", "shared").model
    model.generation_config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=PAD)
    assert model.generate(torch.tensor([PROMPT])).shape == (1, len(PROMPT) + 2)


def test_the_policy_is_not_its_own_assistant() -> None:
    model = make_twins("llama", "shared").model
    for assistant in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="assistant_model is this very model"):
            generated(model, PROMPT, assistant_model=assistant)
    with pytest.raises(ValueError, match="assistant_early_exit would run the policy"):
        generated(model, PROMPT, assistant_early_exit=1)
    with pytest.raises(ValueError, match="'static' does not go with assisted decoding"):
        generated(model, PROMPT, prompt_lookup_num_tokens=2, cache_implementation="static")


@each_mode
def test_a_model_can_be_copied_and_pickled(kv_mode: str) -> None:
    """As spawned processes need it, after a call too. (Files of ours are safetensors.)"""
    model = make_twins("llama", kv_mode, lora={"use_dora": True}).model
    expected = generated(model, PROMPT, max_new_tokens=4)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert generated(copied, PROMPT, max_new_tokens=4) == expected


@each_mode
def test_new_weights_count_at_once(kv_mode: str) -> None:
    """Nothing of the adapter is kept from call to call."""
    model = make_twins("llama", kv_mode).model
    generated(model, PROMPT, max_new_tokens=2)
    randomise_adapter(model, seed=99)
    other = copy.deepcopy(model)
    changed = generated(model, PROMPT, max_new_tokens=8)
    for name, parameter in lora_parameters(model).items():
        if "lora_B" in name:
            parameter.data.mul_(-1.0)  # unseen by autograd
    assert generated(model, PROMPT, max_new_tokens=8) != changed
    assert generated(other, PROMPT, max_new_tokens=8) == changed
