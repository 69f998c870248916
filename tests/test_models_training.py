"""Training on packed pairs is exact: loss and gradients against the slow references of `references.py`.

In float32. Tolerances are absolute; the losses are about 2, the largest gradient of every model between 0.1 and 3.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastqadapter as fqa
from references import Branch, Weights, branches_of, preference_loss
from tiny import (
    ARCHITECTURES,
    EXTRAS,
    MODES,
    PAIRS,
    Twins,
    lora_config,
    lora_gradients,
    lora_parameters,
    make_twins,
    packed,
    random_pair,
    randomise_adapter,
    tiny_base,
)

LOSS, GRADIENT = 5e-6, 5e-5
NUMBERS = {"alpha_0": 0.7, "alpha_tilde": 1.3, "gamma": 0.9, "beta": 0.1}
# preset, Q head, numbers of the objective
OBJECTIVES: dict[str, tuple[str, str | None, dict[str, float]]] = {
    "default": ("default", None, {}),
    "default, other numbers": ("default", None, NUMBERS),
    "default, logits head": ("default", "logits", NUMBERS),
    "paper": ("paper", None, NUMBERS),
    "paper, difference head": ("paper", "difference", NUMBERS),
    "reference": ("reference", None, {**NUMBERS, "gamma": 1.0}),
}
CASES = [(name, objective) for name in ("llama", "gemma2", "gemma3") for objective in OBJECTIVES] + [
    (name, objective)
    for name in ("qwen3", "phi3", "gpt_oss", *EXTRAS)
    for objective in ("default, other numbers", "reference")
]
each_mode = pytest.mark.parametrize("kv_mode", MODES)


@functools.lru_cache(maxsize=2)
def twins_and_branches(name: str, kv_mode: str) -> tuple[Twins, list[Branch]]:
    twins = make_twins(name, kv_mode)
    return twins, branches_of(twins.base, twins.adapted, PAIRS, kv_mode)


def loss_and_gradients(model: fqa.QAdapterModel, pairs: Any = PAIRS) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(packed(pairs, model)).loss
    loss.backward()
    return loss.detach(), lora_gradients(model)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: (actual[name] - expected[name]).abs().max().item() for name in expected}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    assert errors[worst] <= tolerance, f"{worst}: off by {errors[worst]:.3g}, allowed {tolerance:.3g}"


# --- equal to the references ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kv_mode", "objective"),
    [(name, kv_mode, objective) for kv_mode in MODES for name, objective in CASES],  # one model after the other
)
def test_loss_and_gradients_equal_the_reference(name: str, kv_mode: str, objective: str) -> None:
    preset, q_head, numbers = OBJECTIVES[objective]
    twins, branches = twins_and_branches(name, kv_mode)
    twins.adapted.zero_grad(set_to_none=True)
    expected = preference_loss(branches, Weights(**numbers), preset, q_head)
    expected.backward(retain_graph=True)
    config = fqa.QAdapterConfig(kv_mode=kv_mode, preset=preset, q_head=q_head, **numbers)
    twins.model.qadapter_configs["default"] = config
    loss, gradients = loss_and_gradients(twins.model)
    assert abs(loss - expected).item() <= LOSS
    expected_gradients = lora_gradients(twins.adapted)
    assert all(gradient.any() for gradient in expected_gradients.values())
    assert_same(gradients, expected_gradients, GRADIENT)


@each_mode
def test_modes_are_different_functions(kv_mode: str) -> None:
    """The references would be worth nothing if the tiny models did not tell the modes apart."""
    twins = make_twins("llama", "shared")  # K and V without adapter: every mode can run it
    wrong = [mode for mode in MODES if mode != kv_mode]
    losses = {mode: preference_loss(branches_of(twins.base, twins.adapted, PAIRS, mode), Weights()) for mode in MODES}
    assert all(abs(losses[kv_mode] - losses[mode]) > 100 * LOSS for mode in wrong)


@each_mode
def test_metrics_equal_the_reference(kv_mode: str) -> None:
    twins, branches = twins_and_branches("llama", kv_mode)
    twins.model.qadapter_configs["default"] = fqa.QAdapterConfig(kv_mode=kv_mode, **NUMBERS)
    metrics = twins.model(packed(PAIRS, twins.model)).metrics
    for key, first in (("logps/chosen", 0), ("logps/rejected", 1)):
        expected = []
        for branch in branches[first::2]:
            length = len(branch.response)
            log_pi = torch.log_softmax(branch.base[:length], dim=-1)
            q = branch.adapted[:length] - branch.base[:length]
            log_policy = torch.log_softmax((q + 0.7 * log_pi) / 1.3, dim=-1)
            expected.append(log_policy.gather(1, torch.tensor(branch.response)[:, None]).sum())
        torch.testing.assert_close(metrics[key], torch.stack(expected), atol=2e-5, rtol=0)
    for pair in range(len(PAIRS)):
        one = preference_loss(branches[2 * pair : 2 * pair + 2], Weights(**NUMBERS))
        both_terms = metrics["pref_loss"][pair] + 0.1 * metrics["chi2_loss"][pair]
        assert both_terms.item() == pytest.approx(one.item(), abs=LOSS)
    assert not any(metric.requires_grad for metric in metrics.values())


@each_mode
def test_untrained_adapter_has_no_reward(kv_mode: str) -> None:
    for name in ARCHITECTURES:
        model = make_twins(name, kv_mode, trained=False).model
        output = model(packed(PAIRS, model))
        assert output.loss.item() == pytest.approx(math.log(2), abs=1e-5), name
        for key in ("rewards/chosen", "rewards/rejected", "values/mean", "q_values/mean", "chi2_loss"):
            assert output.metrics[key].abs().max().item() <= 1e-5, (name, key)


@each_mode
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_pairs_do_not_see_each_other(name: str, kv_mode: str) -> None:
    """The loss of a batch is the mean of the losses of its pairs, each alone; gradients too; the order is free."""
    model = make_twins(name, kv_mode, **NUMBERS).model
    loss, gradients = loss_and_gradients(model)
    alone = [loss_and_gradients(model, [pair]) for pair in PAIRS]
    assert torch.stack([each for each, _ in alone]).mean().item() == pytest.approx(loss.item(), abs=LOSS)
    mean = {key: sum(each[key] for _, each in alone) / len(PAIRS) for key in gradients}
    assert_same(gradients, mean, GRADIENT)
    metrics = model(packed(PAIRS, model)).metrics
    reversed_metrics = model(packed(PAIRS[::-1], model)).metrics
    for key in metrics:
        torch.testing.assert_close(metrics[key], reversed_metrics[key].flip(0), atol=1e-4, rtol=1e-5)


@each_mode
def test_active_adapter_is_the_one_trained(kv_mode: str) -> None:
    twins = make_twins("llama", kv_mode, adapters=("default", "polite"), lora={"layers_to_transform": [1, 2]})
    for adapter in ("polite", "default"):
        for each in (twins.model, twins.adapted):
            each.set_adapter(adapter)
            each.zero_grad(set_to_none=True)
        expected = preference_loss(branches_of(twins.base, twins.adapted, PAIRS, kv_mode), Weights())
        expected.backward()
        loss, gradients = loss_and_gradients(twins.model)
        assert abs(loss - expected).item() <= LOSS
        assert_same(gradients, lora_gradients(twins.adapted), GRADIENT)
        assert all(gradient.any() == (f".{adapter}." in name) for name, gradient in gradients.items())


@each_mode
def test_backward_through_the_same_graph_twice(kv_mode: str) -> None:
    model = make_twins("gemma3", kv_mode).model
    loss = model(packed(PAIRS, model)).loss
    loss.backward(retain_graph=True)
    once = lora_gradients(model)
    model.zero_grad(set_to_none=True)
    loss.backward()
    assert_same(lora_gradients(model), once, 0.0)


# --- the trunk --------------------------------------------------------------------------------------------------------


def count_attention_calls(model: fqa.QAdapterModel) -> list[int]:
    calls = [0] * len(model.streams.layers)
    for index, layer in enumerate(model.streams.layers):

        def count(*args: Any, index: int = index) -> None:
            calls[index] += 1

        layer.self_attn.register_forward_hook(count)
    return calls


@each_mode
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss"])
def test_trunk_changes_nothing_but_the_work(name: str, kv_mode: str) -> None:
    twins = make_twins(name, kv_mode, lora={"layers_to_transform": [2]}, **NUMBERS)
    assert twins.model.streams.trunk_depth == 2
    calls = count_attention_calls(twins.model)
    loss, gradients = loss_and_gradients(twins.model)
    assert calls == [1, 1] + [2] * (len(calls) - 2)

    expected = preference_loss(branches_of(twins.base, twins.adapted, PAIRS, kv_mode), Weights(**NUMBERS))
    expected.backward()
    assert abs(loss - expected).item() <= LOSS
    assert_same(gradients, lora_gradients(twins.adapted), GRADIENT)

    twins.model.streams.trunk_depth = 0
    calls[:] = [0] * len(calls)
    full_loss, full_gradients = loss_and_gradients(twins.model)
    assert calls == [2] * len(calls)
    assert abs(loss - full_loss).item() <= LOSS
    assert_same(gradients, full_gradients, GRADIENT)


@each_mode
def test_trunk_ends_at_the_lowest_of_all_adapters(kv_mode: str) -> None:
    twins = make_twins("llama", kv_mode, lora={"layers_to_transform": [2]})
    alone, _ = loss_and_gradients(twins.model)
    twins.model.add_adapter("low", lora_config("llama", kv_mode, layers_to_transform=[0]))
    assert twins.model.streams.trunk_depth == 0
    randomise_adapter(twins.model, "low")
    assert torch.equal(loss_and_gradients(twins.model)[0], alone)
    twins.model.set_adapter("low")
    assert abs(loss_and_gradients(twins.model)[0] - alone).item() > 100 * LOSS


class Refusal(Exception):
    pass


@each_mode
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_everything_is_put_back_after_an_exception(kv_mode: str, failing_pass: int) -> None:
    model = make_twins("gemma3", kv_mode, lora={"layers_to_transform": [2, 3]}).model
    layers, config = model.streams.layers, model.streams.decoder.config
    own_forward = layers[1].forward  # as accelerate's hooks set one on the instance
    layers[1].forward = lambda *args, **kwargs: own_forward(*args, **kwargs)
    set_before = layers[1].forward
    before, gradients = loss_and_gradients(model)
    implementation = config._attn_implementation
    passes = 0

    def fail(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == failing_pass:
            raise Refusal

    handle = layers[3].register_forward_hook(fail)
    with pytest.raises(Refusal):
        model(packed(PAIRS, model))
    handle.remove()
    assert layers[1].forward is set_before
    assert all("forward" not in layer.__dict__ for index, layer in enumerate(layers) if index != 1)
    assert not any(layer._forward_pre_hooks for layer in layers)
    assert config._attn_implementation == implementation != "fqa_packed"
    assert torch.is_grad_enabled()
    loss, again = loss_and_gradients(model)
    assert torch.equal(loss, before)
    assert_same(again, gradients, 0.0)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


def enable_checkpointing(model: nn.Module, use_reentrant: bool) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:  # that variant asks for it with any frozen base
        model.enable_input_require_grads()


@pytest.mark.parametrize("layers", [None, [1, 2]], ids=["all layers", "trunk"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@each_mode
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gradient_checkpointing(name: str, kv_mode: str, use_reentrant: bool, layers: list[int] | None) -> None:
    model = make_twins(name, kv_mode, lora={"layers_to_transform": layers}).model.train()
    expected_loss, expected = loss_and_gradients(model)
    enable_checkpointing(model, use_reentrant)
    calls = count_attention_calls(model)
    loss, gradients = loss_and_gradients(model)
    assert calls[2] == 3  # base pass, Q pass, and the recomputation: it did checkpoint
    assert abs(loss - expected_loss).item() <= LOSS
    assert_same(gradients, expected, GRADIENT)


@each_mode
def test_base_with_checkpointing_already_on(kv_mode: str) -> None:
    base = tiny_base("llama").train()
    enable_checkpointing(base, use_reentrant=False)
    model = fqa.get_qadapter_model(base, fqa.QAdapterConfig(kv_mode=kv_mode), lora_config("llama", kv_mode))
    randomise_adapter(model)
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(model.eval())  # transformers checkpoints in training mode alone
    assert abs(loss - expected_loss).item() <= LOSS
    assert_same(gradients, expected, GRADIENT)


# --- what is trained, and dropout -------------------------------------------------------------------------------------


@each_mode
def test_base_is_frozen_and_its_pass_has_no_graph(kv_mode: str) -> None:
    model = make_twins("llama", kv_mode).model.train()
    with_graph = []
    model.streams.layers[1].register_forward_hook(lambda module, args, output: with_graph.append(output.requires_grad))
    hidden_q, hidden_b = model.hidden_states(packed(PAIRS, model))
    assert with_graph == [False, True]
    assert hidden_q.requires_grad and not hidden_b.requires_grad
    loss_and_gradients(model)
    adapter = {id(parameter) for parameter in lora_parameters(model).values()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in adapter), name
        assert (parameter.grad is not None) == (id(parameter) in adapter), name


@each_mode
def test_no_graph_without_gradients(kv_mode: str) -> None:
    model = make_twins("llama", kv_mode).model
    with torch.no_grad():
        loss = model(packed(PAIRS, model)).loss
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(model(packed(PAIRS, model)).loss.item(), abs=LOSS)


@each_mode
def test_lora_dropout_acts_on_the_q_stream_alone(kv_mode: str) -> None:
    batch = packed(PAIRS, make_twins("llama", kv_mode).model)
    plain_q, plain_b = make_twins("llama", kv_mode).model.hidden_states(batch)
    model = make_twins("llama", kv_mode, lora={"lora_dropout": 0.5}).model
    for hidden_q, hidden_b in (model.eval().hidden_states(batch), model.hidden_states(batch)):
        assert torch.equal(hidden_b, plain_b) and torch.equal(hidden_q, plain_q)
    model.train()
    (first, first_b), (second, second_b) = model.hidden_states(batch), model.hidden_states(batch)
    assert torch.equal(first_b, plain_b) and torch.equal(second_b, plain_b)
    assert not torch.allclose(first, plain_q, atol=1e-2)
    assert not torch.allclose(first, second, atol=1e-2)


DROPOUT = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}


@each_mode
@pytest.mark.parametrize("wrapped_in", ["eval", "train"])
def test_dropout_of_the_base_is_off(kv_mode: str, wrapped_in: str) -> None:
    """A noisy base is no frozen policy: in training mode too, both streams run without the dropout of the base."""
    quiet = make_twins("phi", kv_mode).model
    base = tiny_base("phi", **DROPOUT)
    base.train(wrapped_in == "train")
    model = fqa.get_qadapter_model(base, fqa.QAdapterConfig(kv_mode=kv_mode), lora_config("phi", kv_mode))
    with torch.no_grad():
        for name, parameter in lora_parameters(quiet).items():
            lora_parameters(model)[name].copy_(parameter)
    batch = packed(PAIRS, model)
    for hidden, expected in zip(model.train().hidden_states(batch), quiet.hidden_states(batch), strict=True):
        assert torch.equal(hidden, expected)


def functional_dropout(prefix: str) -> fqa.QAdapterModel:
    """A wrapped model whose layers call `F.dropout` with a probability of their own, of 0.5."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
    own: dict[str, Any] = {
        "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
        "SeedOss": {"intermediate_size": 48, "num_key_value_heads": 2, "residual_dropout": 0.5},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**sizes, **own[prefix])
    return fqa.get_qadapter_model(getattr(transformers, f"{prefix}ForCausalLM")(config).train())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prefix", ["OPT", "SeedOss"])
def test_functional_dropout_of_the_base_is_off(prefix: str, checkpointing: bool) -> None:
    model = functional_dropout(prefix)
    if checkpointing:
        enable_checkpointing(model, use_reentrant=False)
    loss = model.train()(packed(PAIRS, model)).loss
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
    assert torch.equal(loss, model(packed(PAIRS, model)).loss)
    loss.backward()


def test_lora_dropout_follows_the_mode() -> None:
    model = make_twins("llama", "shared", lora={"lora_dropout": 0.5}).model
    quiet = model(packed(PAIRS, model)).loss
    assert torch.equal(model(packed(PAIRS, model)).loss, quiet)
    model.train()
    assert not torch.equal(model(packed(PAIRS, model)).loss, quiet)
    assert torch.equal(model.eval()(packed(PAIRS, model)).loss, quiet)


# --- dtypes and lengths -----------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_bfloat16_base_with_float32_adapter(name: str, kv_mode: str) -> None:
    """PEFT's default: the adapter stays in float32. Compared in float32 with weights rounded to bfloat16."""
    config = {"kv_mode": kv_mode, "divisor": "max_length"}
    exact = make_twins(name, **config)
    with torch.no_grad():
        for parameter in exact.model.get_base_model().parameters():
            if parameter.shape and not parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    base = tiny_base(name, torch.bfloat16)
    model = fqa.get_qadapter_model(base, fqa.QAdapterConfig(**config), lora_config(name, kv_mode))
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}
    untrained = model(packed(PAIRS, model)).loss
    assert untrained.item() == pytest.approx(math.log(2), abs=2e-2)
    with torch.no_grad():
        for key, parameter in lora_parameters(exact.model).items():
            lora_parameters(model)[key].copy_(parameter)
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = loss_and_gradients(exact.model)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.05)
    flat, flat_expected = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients, expected))
    assert torch.cosine_similarity(flat, flat_expected, dim=0).item() > 0.98


@each_mode
def test_long_sequences_pass_every_window_many_times(kv_mode: str) -> None:
    pairs = [random_pair(30, 40, 3, seed=5), random_pair(2, 1, 50, seed=6)]
    twins = make_twins("gemma3", kv_mode, **NUMBERS)
    expected = preference_loss(branches_of(twins.base, twins.adapted, pairs, kv_mode), Weights(**NUMBERS))
    expected.backward()
    loss, gradients = loss_and_gradients(twins.model, pairs)
    assert abs(loss - expected).item() <= LOSS
    assert_same(gradients, lora_gradients(twins.adapted), GRADIENT)


@each_mode
def test_positions_beyond_the_context_window(kv_mode: str) -> None:
    """The packed axis may be longer than the longest position; only the positions inside a branch count."""
    pairs = [random_pair(20, 20, 20, seed=seed) for seed in range(7, 12)]
    settings = {"base_settings": {"max_position_embeddings": 40}}
    model = make_twins("llama", kv_mode, **settings).model
    alone = [loss_and_gradients(model, [pair])[0] for pair in pairs]
    assert loss_and_gradients(model, pairs)[0].item() == pytest.approx(torch.stack(alone).mean().item(), abs=LOSS)
