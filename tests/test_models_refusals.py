"""What cannot work is refused with the reason, and the user's base model is then as it was before."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

import fastqadapter as fqa
from references import CACHE_NAME
from tiny import MODES, PAD, PAIRS, lora_config, make_twins, packed, random_ids, tiny_base

PROMPT = torch.tensor([random_ids(6, seed=60)])
each_mode = pytest.mark.parametrize("kv_mode", MODES)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refusal might leave changed in a base model."""
    with torch.no_grad():
        logits = model(input_ids=PROMPT).logits
    return {
        "logits": logits.tolist(),
        "class": type(model),
        "attributes": sorted(model.__dict__),
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "trainable": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "dropout": [module.p for module in model.modules() if isinstance(module, nn.Dropout)],
        "training": model.training,
        "attention": model.config._attn_implementation,
    }


def assert_refused_and_untouched(base: PreTrainedModel, kv_mode: str, peft_config: Any, reason: str) -> None:
    before = snapshot(base)
    with pytest.raises(ValueError, match=reason):
        fqa.get_qadapter_model(base, fqa.QAdapterConfig(kv_mode=kv_mode), peft_config)
    after = snapshot(base)
    assert [key for key in before if before[key] != after[key]] == []


# --- adapters where the method cannot have them -----------------------------------------------------------------------


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj"], **settings})


REFUSED_ADAPTERS: dict[str, tuple[Callable[[], Any], str]] = {
    "LM head": (lambda: lora(target_modules=["q_proj", "lm_head"]), "adapter on 'lm_head'.*frozen and shared"),
    "embeddings": (lambda: lora(target_modules=["q_proj", "embed_tokens"]), "embed_tokens'.*frozen and shared"),
    "saved modules": (lambda: lora(modules_to_save=["lm_head"]), "lm_head.*would be trained.*modules_to_save"),
    "saved norms": (lambda: lora(modules_to_save=["input_layernorm"]), "layernorm.*would be trained"),
    "all biases": (lambda: lora(bias="all"), "bias='all'.*would be trained"),
    "adapted biases": (lambda: lora(bias="lora_only"), "bias='lora_only'.*would be trained"),
    "new tokens": (lambda: lora(trainable_token_indices=[5, 6]), r"indices=\[5, 6\].*would be trained"),
    "pissa": (lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa' rewrites the base"),
    "olora": (lambda: lora(init_lora_weights="olora"), "init_lora_weights='olora' rewrites the base"),
    "repeated layers": (lambda: lora(layer_replication=[(0, 2), (1, 3)]), "layer_replication is not supported"),
    "activated LoRA": (lambda: lora(alora_invocation_tokens=[3, 4]), "alora_invocation_tokens is not supported"),
    "another method": (lambda: IA3Config(task_type="CAUSAL_LM"), "IA3.*use a LoraConfig"),
    "prompt tuning": (
        lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "PROMPT_TUNING.*use a LoraConfig",
    ),
    "no such module": (lambda: lora(target_modules=["nonsense"]), "nonsense"),
}


@pytest.mark.parametrize("refused", REFUSED_ADAPTERS)
@pytest.mark.parametrize("kv_mode", ["separate", "shared"])
def test_refused_adapter(kv_mode: str, refused: str) -> None:
    make_config, reason = REFUSED_ADAPTERS[refused]
    base = tiny_base("llama", attention_bias=True)
    assert_refused_and_untouched(base, kv_mode, make_config(), reason)


@pytest.mark.parametrize("target", [["k_proj"], ["q_proj", "v_proj"], "all-linear", r".*layers\.1\.self_attn\..*_proj"])
def test_keys_and_values_of_shared_mode_have_no_adapter(target: Any) -> None:
    reason = "self_attn.[kv]_proj'.*kv_mode='shared'.*kv_mode='separate' or 'prompt'"
    assert_refused_and_untouched(tiny_base("llama"), "shared", lora(target_modules=target), reason)
    for kv_mode in ("separate", "prompt"):
        if target != "all-linear":
            fqa.get_qadapter_model(tiny_base("llama"), fqa.QAdapterConfig(kv_mode=kv_mode), lora(target_modules=target))


@each_mode
def test_default_targets_are_legal(kv_mode: str) -> None:
    for name in ("llama", "phi3", "gpt_oss", "phi"):
        model = fqa.get_qadapter_model(tiny_base(name), fqa.QAdapterConfig(kv_mode=kv_mode))
        adapted = {
            name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
        }
        assert ("k_proj" in adapted) == (kv_mode != "shared" and name != "phi3")
        assert adapted and not adapted & {"lm_head", "embed_tokens", "router"}


def test_a_refusal_in_training_mode_leaves_dropout_alone() -> None:
    base = tiny_base("phi", resid_pdrop=0.5).train()
    probabilities = [module.p for module in base.modules() if isinstance(module, nn.Dropout)]
    with pytest.raises(ValueError):
        fqa.get_qadapter_model(base, peft_config=lora(target_modules=["lm_head"]))
    assert [module.p for module in base.modules() if isinstance(module, nn.Dropout)] == probabilities
    assert base.training


def test_a_second_try_on_the_same_base_is_a_first_one() -> None:
    """After a refusal the base takes a proper adapter, without PEFT's warning about a second one."""
    base = tiny_base("llama")
    with pytest.raises(ValueError):
        fqa.get_qadapter_model(base, peft_config=lora(target_modules=["lm_head"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = fqa.get_qadapter_model(base, peft_config=lora())
    assert model(packed(PAIRS, model)).loss.item() == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("refused", ["lm_head", "k_proj"])
def test_refused_further_adapter(refused: str) -> None:
    """The adapters that are there go on as before, and the next proper one is welcome."""
    model = make_twins("llama", "shared").model
    with torch.no_grad():
        logits, loss = model(input_ids=PROMPT).logits, model(packed(PAIRS, model)).loss
    with pytest.raises(ValueError, match=refused):
        model.add_adapter("bad", lora(target_modules=[refused]))
    assert set(model.peft_config) == set(model.qadapter_configs) == {"default"}
    with torch.no_grad():
        assert torch.equal(model(input_ids=PROMPT).logits, logits)
        assert torch.equal(model(packed(PAIRS, model)).loss, loss)
    model.add_adapter("good", lora_config("llama", "shared"))
    assert set(model.qadapter_configs) == {"default", "good"}


def test_a_further_adapter_has_the_default_targets_too() -> None:
    model = make_twins("llama", "shared").model
    model.add_adapter("good", LoraConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["good"].target_modules == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_default_targets_of_a_multimodal_base_stay_in_the_language_model() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config={**SMALL, **sizes, "num_key_value_heads": 2, "head_dim": 8},
        vision_config={**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    model = fqa.get_qadapter_model(transformers.Gemma3ForConditionalGeneration(config).eval())
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert adapted and all(".language_model.layers." in name for name in adapted)
    with pytest.raises(ValueError, match="pixel_values is not available"):
        model(input_ids=PROMPT, pixel_values=torch.zeros(1, 3, 28, 28))


def test_what_peft_offers_and_this_method_does_not_have() -> None:
    model = make_twins("llama", "shared").model
    with pytest.raises(ValueError, match="residual Q-functions add, at generation"):
        model.add_weighted_adapter(["default"], [0.5], "mix")
    with pytest.raises(ValueError, match="'default' is the only adapter"):
        model.delete_adapter("default")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((LoraConfig(), None), "config is a LoraConfig; give a QAdapterConfig"),
        (({"kv_mode": "shared"}, None), "config is a dict; give a QAdapterConfig"),
        ((None, fqa.QAdapterConfig()), "peft_config is a QAdapterConfig; give a PeftConfig"),
    ],
)
def test_configs_in_the_wrong_place(arguments: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fqa.get_qadapter_model(tiny_base("llama"), *arguments)


def test_dora_and_other_honest_loras_are_welcome() -> None:
    for settings in ({"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"init_lora_weights": "gaussian"}):
        base = tiny_base("llama", attention_bias=True)
        model = fqa.get_qadapter_model(base, fqa.QAdapterConfig(kv_mode="separate"), lora(**settings))
        loss = model(packed(PAIRS, model)).loss
        assert loss.item() == pytest.approx(0.6931, abs=1e-3), settings
        loss.backward()


# --- base models ------------------------------------------------------------------------------------------------------


def with_native_adapter(base: PreTrainedModel) -> PreTrainedModel:
    return inject_adapter_in_model(lora(), base)  # what transformers' own `add_adapter` does


@pytest.mark.parametrize(
    "make",
    [
        lambda: get_peft_model(tiny_base("llama"), lora()),
        lambda: get_peft_model(tiny_base("llama"), LoraConfig(target_modules=["q_proj"])),  # no task: a plain PeftModel
        lambda: fqa.get_qadapter_model(tiny_base("llama"), peft_config=lora()),
        lambda: fqa.get_qadapter_model(tiny_base("llama"), peft_config=lora()).get_base_model(),
        lambda: with_native_adapter(tiny_base("llama")),
    ],
    ids=["causal LM", "no task", "Q-Adapter", "inside of a Q-Adapter", "transformers' own adapter"],
)
def test_a_base_with_adapters_is_refused(make: Callable[[], Any]) -> None:
    base = make()
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match="already"):
        fqa.get_qadapter_model(base, peft_config=lora())
    assert [(name, type(module)) for name, module in base.named_modules()] == before


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "Falcon": (SMALL, "does not use transformers' attention interface"),
    "Mpt": ({"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4}, "attention interface"),
    "Bloom": ({"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "attention interface"),
    "Mamba": ({"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}, r"\['linear_attention'\]"),
    "Qwen3Next": (
        {
            **SMALL,
            "num_key_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        r"layers of type \['linear_attention'\]; packed training knows full and sliding",
    ),
}


@pytest.mark.parametrize("prefix", FOREIGN)
def test_architectures_that_packed_training_cannot_serve(prefix: str) -> None:
    settings, reason = FOREIGN[prefix]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    base = getattr(transformers, f"{prefix}ForCausalLM")(config)
    modules = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match=f"{prefix}ForCausalLM.*{reason}"):
        fqa.get_qadapter_model(base)
    assert [(name, type(module)) for name, module in base.named_modules()] == modules


def test_attention_with_a_mask_of_its_own() -> None:
    """Doge learns a mask and hands it to the attention function; packed attention must not drop it silently."""
    settings = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48}
    base = transformers.DogeForCausalLM(transformers.DogeConfig(**settings)).eval()
    with pytest.raises(ValueError, match="Doge"):
        model = fqa.get_qadapter_model(base, peft_config=lora())
        model(packed(PAIRS, model))


def test_a_softcap_of_the_attention_is_not_left_to_sdpa() -> None:
    base = tiny_base("gemma2")
    base.config._attn_implementation = base.model.config._attn_implementation = "sdpa"  # as transformers 5.16 has it
    fqa.get_qadapter_model(base)
    assert base.config._attn_implementation == base.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kv_mode", ["prompt", "shared"])
def test_a_layer_that_attends_twice(kv_mode: str) -> None:
    """DiffLlama does: there are two K/V to record, and one place for them."""
    settings = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48}
    base = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**settings)).eval()
    config = fqa.QAdapterConfig(kv_mode=kv_mode)
    with pytest.raises(ValueError, match=f"DiffLlama.*cannot be served with kv_mode='{kv_mode}'.*attends twice"):
        fqa.get_qadapter_model(base, config, lora())


class ScaledLogits(transformers.LlamaForCausalLM):
    """Scales its logits in a way that no config tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2.0 * output.logits
        return output


ScaledLogits.__module__ = transformers.LlamaForCausalLM.__module__


@pytest.mark.parametrize("pad_token_id", [None, PAD], ids=["no pad token", "pad token 0"])
def test_logits_that_we_do_not_understand(pad_token_id: int | None) -> None:
    """A token with an embedding of zeros, as the pad token has, must not hide it."""
    base = tiny_base("llama", pad_token_id=pad_token_id)
    base.__class__ = ScaledLogits
    with pytest.raises(ValueError, match="ScaledLogits computes its logits in a way that fastqadapter does not know"):
        fqa.get_qadapter_model(base, peft_config=lora())


def test_models_without_an_lm_head() -> None:
    with pytest.raises(ValueError, match="LlamaModel.*give a causal LM"):
        fqa.get_qadapter_model(tiny_base("llama").model, peft_config=lora())
    classifier = transformers.LlamaForSequenceClassification(tiny_base("llama").config)
    with pytest.raises(ValueError, match="LM head"):
        fqa.get_qadapter_model(classifier, peft_config=lora())


# --- calls ------------------------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize(
    ("dials", "reason"),
    [
        ({"adapters": ["default"]}, r"adapters=\['default'\] is a list"),
        ({"adapters": {"default": "1"}}, "'1'.*not a finite number"),
        ({"adapters": {"default": -1e300}}, "default: -1e\\+300 / alpha_tilde .*argmax"),
        ({"alpha_0": 1e39}, "alpha_0: 1e\\+39 / alpha_tilde .*argmax"),
        ({"alpha_0": "1"}, "alpha_0='1' is no Python number"),
        ({"adapters": {"unknown": 1.0}}, r"\['unknown'\] are not loaded; loaded are \['default'\]"),
        ({"adapters": {"default": float("inf")}}, "inf.*not a finite number"),
        ({"adapters": {"default": float("nan")}}, "nan.*not a finite number"),
        ({"alpha_tilde": 0.0}, "alpha_tilde=0"),
        ({"alpha_tilde": -1.0}, "alpha_tilde=-1"),
        ({"alpha_0": -0.5}, "alpha_0=-0.5"),
        ({"alpha_0": float("nan")}, "alpha_0=nan"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'.*use 'dynamic' or 'static'"),
        ({CACHE_NAME: StaticCache(tiny_base("llama").config, 9)}, "the cache is a StaticCache; give.*DynamicCache"),
        ({CACHE_NAME: DynamicCache(offloading=True)}, "the cache is an offloaded DynamicCache"),
        ({CACHE_NAME: DynamicCache(), "cache_implementation": "static"}, "'static' is for a new cache, and one was"),
        ({"adapters": {"default": [1.0, 0.5]}}, "2 weights of one adapter for 1 sequences"),
        ({"adapters": {"default": [1.0, float("nan")]}}, "nan.*not a finite number"),
        ({"adapters": {"default": []}}, "not a finite number"),
        ({"adapters": {"default": 10**400}}, "not a finite number"),
        ({"adapters": {"default": b"1"}}, "not a finite number"),
        ({"adapters": {"default": torch.ones(2, 2)}}, "the weight is not a finite number"),
        ({"adapters": {1: 1.0, "x": 2.0}}, "1, 'x'. are not loaded"),
        ({"adapters": {"default": [0.5, -1e300]}}, "default: -1e\\+300 / alpha_tilde .*argmax"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True is not available"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True is not available"),
    ],
    ids=str,
)
def test_refused_generation(kv_mode: str, dials: dict[str, Any], reason: str) -> None:
    model = make_twins("llama", kv_mode).model
    inner = model.get_base_model()
    with pytest.raises(ValueError, match=reason):
        model.generate(PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=PAD, **dials)
    assert type(inner) is transformers.LlamaForCausalLM and not hasattr(inner, "_fqa_policy")


@pytest.mark.parametrize(
    "weights", [{"default": 0.5}, {"default": 1.0, "polite": 1.0}, {"default": 0.0, "polite": 2.0}]
)
def test_a_logits_head_does_not_mix(weights: dict[str, float]) -> None:
    model = make_twins("llama", "shared", adapters=("default", "polite"), q_head="logits").model
    with pytest.raises(ValueError, match="needs q_head='difference'"):
        model.generate(PROMPT, max_new_tokens=2, adapters=weights)


@each_mode
def test_refused_forward(kv_mode: str) -> None:
    model = make_twins("llama", kv_mode).model
    for inputs, reason in (
        ({"labels": PROMPT}, "labels are not used here.*PreferenceCollator"),
        ({CACHE_NAME: StaticCache(model.get_base_model().config, 9)}, "the cache is a StaticCache"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"output_hidden_states": True}, "output_hidden_states=True"),
        ({"encoder_hidden_states": torch.zeros(1, 2, 3)}, "encoder_hidden_states is not available"),
        ({"input_ids": None}, "give input_ids or inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=reason):
            model(**{"input_ids": PROMPT, "logits_to_keep": 1, **inputs})


def test_prompt_mode_knows_where_the_prompt_ends() -> None:
    model = make_twins("llama", "prompt").model
    for keep in (0, torch.tensor([4, 5])):
        with pytest.raises(ValueError, match="kv_mode='prompt' gives logits from the last prompt token on"):
            model(input_ids=PROMPT, logits_to_keep=keep)
    with pytest.raises(ValueError, match="use_cache=True"):
        model.generate(PROMPT, max_new_tokens=2, use_cache=False)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(PROMPT, max_new_tokens=2, prefill_chunk_size=2)
    first = model.generate(PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=PAD, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, PROMPT], dim=1)
    with pytest.raises(ValueError, match="cannot take 7 tokens after the prompt at once"):
        model.generate(turn, max_new_tokens=2, **{CACHE_NAME: copy.deepcopy(first[CACHE_NAME])})


def test_batches_that_are_no_pairs() -> None:
    from fastqadapter.packing import pack

    model = make_twins("llama", "shared").model
    with pytest.raises(ValueError, match="two responses for each prompt"):
        model(pack([([3, 4], [[5], [6], [7]])]))
    with pytest.raises(ValueError, match="pad_action"):
        model(pack([([3, 4], [[5], [6]])], pad_action=PAD))
    reference = make_twins("llama", "shared", preset="reference").model
    with pytest.raises(ValueError, match="pad_action=tokenizer.pad_token_id"):
        reference(pack([([3, 4], [[5], [6]])]))
    with pytest.raises(ValueError, match="action 97 is outside the vocabulary"):
        model(pack([([3, 4], [[5], [97]])]))


def test_an_empty_prompt_is_refused_and_a_long_weight_dict_is_named() -> None:
    from fastqadapter.packing import pack_pairs

    with pytest.raises(ValueError, match="at least one token"):
        pack_pairs([([], [1], [2])])
    model = make_twins("llama", "shared").model
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are not loaded"):
        model.generate(PROMPT, adapters={"b": 1.0, "default": 1.0, "a": 1.0})
