"""One pass over all streams against the same streams one after the other, and which models it serves."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

import fastqadapter as fqa
from fastqadapter.demo.smollm import MODEL_NAME, cache_folder
from fastqadapter.models.cache import StreamCache
from fastqadapter.models.row_lora import StreamRows
from fastqadapter.models.two_pass_cache import TwoStreamCache
from fastqadapter.prompts import encode_chats
from fastqadapter.testing import assert_close_to_truth
from generation_cases import PROMPT, PROMPTS, each_mode, each_name, generated, ids_of, trained_twins, two_adapters
from references import CACHE_NAME
from tiny import (
    PAD,
    PAIRS,
    Twins,
    lora_config,
    lora_gradients,
    make_twins,
    packed,
    random_ids,
    randomise_adapter,
    tiny_base,
)

EQUAL = {"atol": 1e-4, "rtol": 0.0}
FOUR = [*PROMPTS, random_ids(6, seed=50)]
SMOLLM2 = cache_folder() / MODEL_NAME
SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}, "3 beams": {"num_beams": 3}}


def in_two_passes(model: fqa.QAdapterModel, *prompts: list[int], **kwargs: Any) -> Any:
    """The same call, the streams one after the other."""
    model.streams.one_pass_refusal, model.streams.is_checked = "the test wants it so", True
    try:
        return outputs_of(model, *prompts, **kwargs)
    finally:
        model.streams.one_pass_refusal = None


def outputs_of(model: fqa.QAdapterModel, *prompts: list[int], **kwargs: Any) -> Any:
    kwargs = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 10, "output_logits": True, **kwargs}
    return model.generate(**ids_of(*prompts), return_dict_in_generate=True, **kwargs)


def assert_same_steps(model: fqa.QAdapterModel, *prompts: list[int], **kwargs: Any) -> Any:
    """Tokens equal, and the logits of every step to 1e-4 (float32)."""
    ours = outputs_of(model, *prompts, **kwargs)
    assert model.streams.one_pass_refusal is None
    expected = in_two_passes(model, *prompts, **kwargs)
    assert isinstance(ours[CACHE_NAME], StreamCache) and isinstance(expected[CACHE_NAME], TwoStreamCache)
    assert ours.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), **EQUAL)
    return ours


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("prompts", [[PROMPT], FOUR], ids=["batch 1", "batch 4"])
@each_mode
@each_name
def test_equals_two_passes(name: str, kv_mode: str, prompts: list[list[int]], search: str) -> None:
    """Every architecture, in every mode it allows, with ragged left padding."""
    assert_same_steps(trained_twins(name, kv_mode).model, *prompts, **SEARCHES[search])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("targets", [None, ["q_proj", "o_proj"], ["down_proj"]], ids=str)
@each_mode
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_trunk(name: str, kv_mode: str, targets: list[str] | None, search: str) -> None:
    """Layers below the first adapted one run on the rows of the base alone, and keep one row of K/V a sequence."""
    lora: dict[str, Any] = {"layers_to_transform": [1, 2]}
    if targets and name in ("llama", "gemma3"):
        lora["target_modules"] = targets
    twins = make_twins(name, kv_mode, lora=lora)
    assert twins.model.streams.trunk_depth == 1
    output = assert_same_steps(twins.model, *FOUR, **SEARCHES[search])
    rows = [layer.keys.shape[0] for layer in output[CACHE_NAME].layers]
    batch = len(FOUR) * SEARCHES[search].get("num_beams", 1)
    above = batch if kv_mode == "shared" else 2 * batch
    assert rows == [batch] + [above] * (len(rows) - 1)


@each_mode
def test_trunk_of_all_layers_but_the_last(kv_mode: str) -> None:
    assert_same_steps(make_twins("llama", kv_mode, lora={"layers_to_transform": [2]}).model, *FOUR)


@pytest.mark.parametrize(
    "mixture", [{"default": 0.5, "polite": -1.5}, {"polite": 2.0}, {"polite": 1.0, "default": 1.0}]
)
@each_mode
def test_mixtures(kv_mode: str, mixture: dict[str, float]) -> None:
    assert_same_steps(two_adapters(kv_mode).model, *FOUR, adapters=mixture)


LORAS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ranks": ({"r": 2}, {"r": 5}),
    "layers": ({"layers_to_transform": [0, 1]}, {"layers_to_transform": [1, 2]}),
    "targets": ({"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["gate_proj", "up_proj", "o_proj"]}),
    "only one of q, k and v": ({"target_modules": ["q_proj"]}, {"target_modules": ["up_proj"]}),
    "DoRA": ({"use_dora": True}, {}),
    "rank-stabilised": ({"use_rslora": True, "r": 3}, {"lora_alpha": 3}),
    "bias": ({"lora_bias": True}, {"lora_bias": True}),
    "dropout": ({"lora_dropout": 0.5}, {}),
    "rank pattern": ({"rank_pattern": {"q_proj": 1, "o_proj": 7}, "alpha_pattern": {"q_proj": 3}}, {}),
}


@pytest.mark.parametrize("kinds", LORAS)
@each_mode
def test_adapters_of_different_kinds(kv_mode: str, kinds: str) -> None:
    first, second = LORAS[kinds]
    config = fqa.QAdapterConfig(kv_mode=kv_mode)
    model = fqa.get_qadapter_model(tiny_base("llama"), config, lora_config("llama", kv_mode, **first)).eval()
    model.add_adapter("polite", lora_config("llama", kv_mode, **second))
    for seed, adapter in enumerate(model.peft_config):
        randomise_adapter(model, adapter, seed)
    for mixture in ({"default": 1.0}, {"polite": 1.0}, {"default": 0.7, "polite": 0.6}):
        assert_same_steps(model, *FOUR[:2], adapters=mixture)


def test_layers_with_one_input_share_their_product() -> None:
    """q, k and v; gate and up; o and down have inputs of their own."""
    model = make_twins("llama", "separate", adapters=("default", "polite")).model
    expected = generated(model, PROMPT, max_new_tokens=3, adapters={"default": 1.0, "polite": 0.5})
    rows = StreamRows(("default", "polite"))
    layer = model.streams.layers[0]
    with model.streams.lora_layers.on_rows(rows):
        members = {
            name: module.low_rank.source for name, module in layer.named_modules() if hasattr(module, "low_rank")
        }
        names = {name.rpartition(".")[2]: source for name, source in members.items()}
        assert names["q_proj"] is names["k_proj"] is names["v_proj"] and names["q_proj"].members == 3
        assert names["gate_proj"] is names["up_proj"] and names["gate_proj"].members == 2
        assert names["o_proj"].members == names["down_proj"].members == 1
    assert not any(module.low_rank for module in model.modules() if hasattr(module, "low_rank"))
    assert generated(model, PROMPT, max_new_tokens=3, adapters={"default": 1.0, "polite": 0.5}) == expected


def test_a_product_is_not_shared_over_other_inputs() -> None:
    """Names promise nothing: each layer's product is of what it is given."""
    model = make_twins("llama", "separate").model
    layer = model.streams.layers[0].self_attn
    inputs = [torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    with model.streams.lora_layers.on_rows(StreamRows(("default",))):
        layer.q_proj(inputs[0])
        found = layer.k_proj(inputs[1])
    base, scaling = layer.k_proj.base_layer(inputs[1]), layer.k_proj.scaling["default"]
    a, b = layer.k_proj.lora_A["default"].weight, layer.k_proj.lora_B["default"].weight
    expected = torch.stack([base[0], base[1] + scaling * (inputs[1][1] @ a.T @ b.T)])
    torch.testing.assert_close(found, expected)


def test_a_model_in_training_mode_with_dropout() -> None:
    """LoRA dropout draws other noise each time: it is PEFT's own forward that runs, on the right rows."""
    model = make_twins("llama", "shared", lora={"lora_dropout": 0.5}).model
    expected = generated(model, PROMPT, max_new_tokens=5)
    assert len(generated(model.train(), PROMPT, max_new_tokens=5)[0]) == 5
    assert generated(model.eval(), PROMPT, max_new_tokens=5) == expected


@pytest.mark.skipif(
    not (cache_folder() / MODEL_NAME / "model.safetensors").exists(),
    reason="needs SmolLM2: `fastqadapter demo` makes it",
)
@each_mode
def test_smollm2_128_tokens(kv_mode: str) -> None:
    """The real 135M model in float32; test_equals_two_passes is the same on tiny ones."""
    base = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    model = fqa.get_qadapter_model(base, fqa.QAdapterConfig(kv_mode=kv_mode), lora).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    chat = [{"role": "user", "content": "How do I say no to my manager without sounding rude?"}]
    [prompt] = encode_chats(AutoTokenizer.from_pretrained(SMOLLM2), [chat])["input_ids"].tolist()
    length = {"max_new_tokens": 128, "min_new_tokens": 128}
    tokens = assert_same_steps(model, prompt, **length).sequences[0, len(prompt) :].tolist()
    assert len(tokens) == 128 and len(set(tokens)) > 20
    assert tokens != generated(model, prompt, adapters={}, **length)[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "deepseek_v3"])
@each_mode
def test_gradients_equal_those_of_two_passes(name: str, kv_mode: str) -> None:
    """`model(input_ids)` can be trained through: the merged attention of `prompt` mode has a gradient too."""
    model = make_twins(name, kv_mode, lora={"layers_to_transform": [1, 2]}).model
    generated(model, PROMPT, max_new_tokens=1)  # the trial
    gradients = []
    for refusal in (None, "the test wants it so"):
        model.streams.one_pass_refusal = refusal
        model.zero_grad()
        logits = model(**ids_of(PROMPT), logits_to_keep=3).logits
        logits.log_softmax(dim=-1)[0, :, 5].sum().backward()
        gradients.append(lora_gradients(model))
    for key, expected in gradients[1].items():
        found = gradients[0][key]
        assert (found - expected).norm() <= 1e-4 * max(1e-3, expected.norm()), key
    assert any(gradient.any() for gradient in gradients[1].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_mode
def test_under_autocast(kv_mode: str, dtype: torch.dtype) -> None:
    model = make_twins("llama", kv_mode).model
    exact = outputs_of(model, *FOUR, max_new_tokens=3)
    fresh = make_twins("llama", kv_mode).model
    for each in (model, fresh):  # tried without autocast, and in it
        with torch.autocast("cpu", dtype):
            output = outputs_of(each, *FOUR, max_new_tokens=3)
        assert each.streams.one_pass_refusal is None and isinstance(output[CACHE_NAME], StreamCache)
        difference = (output.logits[0] - exact.logits[0]).norm() / exact.logits[0].norm()
        assert difference < 0.1


@each_mode
def test_bfloat16_against_two_passes(kv_mode: str) -> None:
    model = make_twins("llama", kv_mode, torch.bfloat16).model
    truth = outputs_of(make_twins("llama", kv_mode).model, PROMPT, max_new_tokens=1).logits[0]
    ours = outputs_of(model, PROMPT, max_new_tokens=1).logits[0]
    expected = in_two_passes(model, PROMPT, max_new_tokens=1).logits[0]
    assert_close_to_truth(ours, expected, truth.double(), name=kv_mode, dtype=torch.bfloat16)


@each_mode
def test_a_row_of_padding_alone(kv_mode: str) -> None:
    """It gives finite logits, as with the base, and does not touch its neighbours."""
    model = trained_twins("llama", kv_mode).model
    inputs = {"input_ids": torch.tensor([PROMPT, [PAD] * 9]), "attention_mask": torch.tensor([[1] * 9, [0] * 9])}
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "return_dict_in_generate": True}
    output = model.generate(**inputs, **kwargs, output_logits=True)
    assert all(bool(logits.isfinite().all()) for logits in output.logits)
    assert output.sequences[0, 9:].tolist() == generated(model, PROMPT, max_new_tokens=4)[0]


@pytest.mark.parametrize("keep", [1, 0])
def test_a_mask_of_four_dimensions(keep: int) -> None:
    model = trained_twins("llama", "shared").model
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    inputs = torch.tensor([PROMPT])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(input_ids=inputs, attention_mask=causal, logits_to_keep=keep).logits
            torch.testing.assert_close(found, model(input_ids=inputs, logits_to_keep=keep).logits)
    with pytest.raises(ValueError, match="attention_mask of four dimensions is torch.float32: give a bool one"):
        model(input_ids=inputs, attention_mask=causal.float())


# --- which models -----------------------------------------------------------------------------------------------------


def expert_twins(kv_mode: str) -> Twins:
    """An adapter on the experts of a mixture, which PEFT puts around their fused weights."""
    targets = ["q_a_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return make_twins("deepseek_v3", kv_mode, lora={"target_modules": targets})


@each_mode
def test_experts_take_two_passes(kv_mode: str, caplog: pytest.LogCaptureFixture) -> None:
    model = expert_twins(kv_mode).model
    with caplog.at_level(logging.WARNING, logger="fastqadapter"):
        output = outputs_of(model, PROMPT)
        assert generated(model, PROMPT, max_new_tokens=10)[0] == output.sequences[0, len(PROMPT) :].tolist()
    assert isinstance(output[CACHE_NAME], TwoStreamCache)
    [message] = [record.getMessage() for record in caplog.records if "two passes" in record.getMessage()]
    assert "the adapter is on experts (layers.1.mlp.experts" in message
    with pytest.raises(ValueError, match="without a static cache"):
        generated(model, PROMPT, cache_implementation="static")


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "not trained yet"])
@each_mode
def test_a_model_that_mixes_its_rows_takes_two_passes(
    kv_mode: str, trained: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As a batch norm would; only a trial can tell."""
    model = make_twins("llama", kv_mode, trained=trained).model
    layer = model.streams.layers[1]
    forward = layer.forward

    def mixing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(hidden_states, *args, **kwargs)
        return output - 0.3 * output.mean(dim=0, keepdim=True) if output.shape[0] > 2 else output

    layer.forward = mixing
    with caplog.at_level(logging.WARNING, logger="fastqadapter"):
        generated(model, PROMPT)
    assert "mixes its rows in a way that one pass does not know" in caplog.text


def test_a_model_that_fails_in_one_pass_takes_two(caplog: pytest.LogCaptureFixture) -> None:
    model = trained_copy("llama", "shared")
    layer = model.streams.layers[1]
    forward = layer.forward

    def failing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[0] > 2:
            raise RuntimeError("only two rows, please")
        return forward(hidden_states, *args, **kwargs)

    layer.forward = failing
    with caplog.at_level(logging.WARNING, logger="fastqadapter"):
        assert len(generated(model, PROMPT, max_new_tokens=4)[0]) == 4
    assert "fails in one pass: only two rows, please" in caplog.text


def trained_copy(name: str, kv_mode: str) -> fqa.QAdapterModel:
    """A model of its own, to be spoilt."""
    return make_twins(name, kv_mode).model


@each_mode
def test_a_diverged_adapter_decides_nothing(kv_mode: str) -> None:
    model = trained_copy("llama", kv_mode)
    weight = model.streams.layers[1].mlp.up_proj.lora_B["default"].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    generated(model, PROMPT, max_new_tokens=1)
    assert model.streams.one_pass_refusal is None and not model.streams.is_checked
    with torch.no_grad():
        weight.copy_(before)
    assert_same_steps(model, PROMPT)
    assert model.streams.is_checked


def test_a_further_adapter_is_tried_anew() -> None:
    model = trained_copy("llama", "shared")
    generated(model, PROMPT, max_new_tokens=2)
    assert model.streams.is_checked and model.streams.one_passes
    model.add_adapter("polite", lora_config("llama", "shared"))
    assert not model.streams.is_checked and not model.streams.one_passes
    randomise_adapter(model, "polite")
    assert_same_steps(model, PROMPT, adapters={"polite": 1.0})


class Ask(LogitsProcessor):
    """Calls something at every step of `generate`."""

    def __init__(self, question: Callable[[], Any]):
        self.question = question
        self.answers: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.answers.append(self.question())
        return scores


def ask_while_generating(model: fqa.QAdapterModel, question: Callable[[], Any]) -> list[Any]:
    ask, tokens = Ask(question), generated(model, PROMPT, max_new_tokens=4)
    assert generated(model, PROMPT, max_new_tokens=4, logits_processor=LogitsProcessorList([ask])) == tokens
    assert len(ask.answers) == 4
    return ask.answers


@each_mode
def test_a_loss_can_be_asked_for_while_generating(kv_mode: str) -> None:
    """A callback of `generate` finds the layers as they are outside of it."""
    model = make_twins("llama", kv_mode, lora={"layers_to_transform": [1, 2]}).model
    batch = packed(PAIRS, model)
    expected = model(batch).loss
    assert all(torch.equal(loss, expected) for loss in ask_while_generating(model, lambda: model(batch).loss))


@pytest.mark.parametrize("adapters", [{}, {"polite": 1.0}, {"default": 0.3, "polite": 0.4}], ids=str)
@each_mode
def test_other_policies_can_be_asked_while_generating(kv_mode: str, adapters: dict[str, float]) -> None:
    """With a trunk, on another batch, of other adapters or of the base alone."""
    model = make_twins("llama", kv_mode, adapters=("default", "polite"), lora={"layers_to_transform": [1, 2]}).model
    question = functools.partial(generated, model, *FOUR[:2], adapters=adapters, max_new_tokens=3)
    expected = question()
    assert all(answer == expected for answer in ask_while_generating(model, question))


@each_mode
def test_the_base_can_be_asked_while_generating(kv_mode: str) -> None:
    twins = make_twins("llama", kv_mode, lora={"layers_to_transform": [1, 2]})

    def question() -> Tensor:
        with twins.model.disable_adapter():
            return twins.model(**ids_of(*FOUR), logits_to_keep=1).logits

    expected = twins.base(**ids_of(*FOUR), logits_to_keep=1).logits
    for answer in ask_while_generating(twins.model, question):
        torch.testing.assert_close(answer, expected, **EQUAL)


def test_hooks_set_after_the_first_call_are_called() -> None:
    """accelerate's hooks replace a layer's forward, in the trunk too."""
    model = make_twins("llama", "shared", lora={"layers_to_transform": [2]}).model
    expected = generated(model, PROMPT, max_new_tokens=4)
    layer = model.streams.layers[0]
    forward, calls = layer.forward, []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape if args else kwargs["hidden_states"].shape)
        return forward(*args, **kwargs)

    layer.forward = hooked
    assert generated(model, PROMPT, max_new_tokens=4) == expected
    # The prompt, with a row for the adapter at its end; then 3 tokens, on the row of the base alone.
    assert calls == [(1, len(PROMPT) + 1, 32), *[(1, 1, 32)] * 3]
    assert layer.forward is hooked
