"""What `from_pretrained` refuses: another base, another mode, folders that are damaged or no Q-Adapter at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import fastqadapter as fqa
from fastqadapter.models.base import check_same_base, fingerprint
from generation_cases import each_mode
from saved_adapters import (
    PROMPT,
    adapter_modules,
    assert_same_function,
    fingerprint_of_function,
    saved,
    trained,
)
from tiny import (
    MODES,
    lora_config,
    lora_parameters,
    tiny_base,
)


def changed(change: Any) -> PreTrainedModel:
    """The right base, but for one change."""
    model = tiny_base("llama")
    with torch.no_grad():
        change(model)
    return model


WRONG_BASES: dict[str, Any] = {
    "other weights": lambda: tiny_base("llama", seed=1),
    "fewer layers": lambda: tiny_base("llama", num_hidden_layers=2),
    "wider": lambda: tiny_base("llama", hidden_size=64),
    "other architecture": lambda: tiny_base("qwen3"),
    "one matrix": lambda: changed(lambda model: model.model.layers[1].mlp.up_proj.weight.mul_(1.1)),
    "one norm": lambda: changed(lambda model: model.model.layers[2].input_layernorm.weight.mul_(1.1)),
    "embeddings": lambda: changed(lambda model: model.model.embed_tokens.weight.mul_(1.1)),
    "LM head": lambda: changed(lambda model: model.lm_head.weight.mul_(1.1)),
}


@pytest.mark.parametrize("wrong", WRONG_BASES)
def test_another_base_is_refused(wrong: str, tmp_path: Path) -> None:
    folder, base = saved(tmp_path), WRONG_BASES[wrong]()
    with torch.no_grad():
        before = base(input_ids=PROMPT).logits
    with pytest.raises(ValueError, match=r"another base model .* differ .* load that base, or pass force=True"):
        fqa.QAdapterModel.from_pretrained(base, folder)
    assert not adapter_modules(base)
    with torch.no_grad():
        assert torch.equal(base(input_ids=PROMPT).logits, before)
    with pytest.raises(ValueError, match="another base model"):
        fqa.get_qadapter_model(base, peft_config=lora_config("llama", "shared")).load_adapter(folder, "second")


def test_force_loads_on_another_base(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = fqa.QAdapterModel.from_pretrained(tiny_base("llama", seed=1), folder, force=True)
    for name, parameter in lora_parameters(trained()).items():
        assert torch.equal(lora_parameters(model)[name], parameter)
    other = fqa.get_qadapter_model(tiny_base("llama", seed=1), peft_config=lora_config("llama", "shared"))
    other.load_adapter(folder, "second", force=True)
    assert set(other.qadapter_configs) == {"default", "second"}


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded_as", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same_base(
    saved_as: torch.dtype, loaded_as: torch.dtype, tmp_path: Path
) -> None:
    tiny_base("llama", saved_as).save_pretrained(tmp_path / "base")
    trained_on = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    fqa.get_qadapter_model(trained_on, peft_config=lora_config("llama", "shared")).save_pretrained(tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=loaded_as)
    fqa.QAdapterModel.from_pretrained(other, tmp_path / "adapter")


@each_mode
def test_another_kv_mode_is_refused(kv_mode: str, tmp_path: Path) -> None:
    saved(tmp_path, kv_mode, name="phi3")  # fused qkv: every mode may have it
    for other in MODES:
        base = tiny_base("phi3")
        if other == kv_mode:
            assert fqa.QAdapterModel.from_pretrained(base, tmp_path, kv_mode=other).streams.kv_mode == other
            continue
        with pytest.raises(ValueError, match=f"kv_mode='{kv_mode}' and is another function with kv_mode='{other}'"):
            fqa.QAdapterModel.from_pretrained(base, tmp_path, kv_mode=other)
        assert not adapter_modules(base)
        forced = fqa.QAdapterModel.from_pretrained(base, tmp_path, kv_mode=other, force=True)
        assert forced.streams.kv_mode == forced.qadapter_config.kv_mode == other
        running = trained(other, name="phi3")
        with pytest.raises(ValueError, match=f"kv_mode='{kv_mode}', this model runs kv_mode='{other}'"):
            running.load_adapter(tmp_path, "second")
        assert set(running.peft_config) == set(running.qadapter_configs) == {"default"}


def no_sidecar(folder: Path) -> None:
    (folder / "qadapter_config.json").unlink()


def pickled(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def sidecar_with(**fields: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "qadapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def broken_json(folder: Path) -> None:
    (folder / "qadapter_config.json").write_text('{"format": 1,')


DAMAGES = {
    "a plain LoRA adapter": (no_sidecar, r"sidecar \(qadapter_config.json\) is missing: a plain LoRA adapter"),
    "pickled weights": (pickled, r"safetensors \(adapter_model.safetensors\) is missing"),
    "a newer format": (sidecar_with(format=2), "qadapter_config.json: format 2 is not 1.*upgrade"),
    "an unknown field": (sidecar_with(delta=1), r"unknown QAdapterConfig fields \['delta'\]"),
    "an illegal value": (sidecar_with(alpha_tilde=0), r"alpha_tilde=0 is outside its legal range"),
    "broken JSON": (broken_json, "qadapter_config.json: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_no_q_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    spoil, reason = DAMAGES[damage]
    spoil(saved(tmp_path))
    base, running = tiny_base("llama"), trained()
    expected = fingerprint_of_function(running)
    for force in (False, True):
        with pytest.raises(ValueError, match=reason):
            fqa.QAdapterModel.from_pretrained(base, tmp_path, force=force)
        assert not adapter_modules(base)
        with pytest.raises(ValueError, match=reason):
            running.load_adapter(tmp_path, "second", force=force)
    assert_same_function(fingerprint_of_function(running), expected)


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for missing in (str(tmp_path / "nowhere"), "nobody/nothing-of-this-name"):
        with pytest.raises(ValueError, match="neither a local folder nor a hub repository within reach"):
            fqa.QAdapterModel.from_pretrained(tiny_base("llama"), missing)


def test_weights_that_do_not_fit_leave_the_base_as_it_was(tmp_path: Path) -> None:
    """Truncated or foreign weights must raise, never give an adapter that is half random."""
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    lost = next(iter(weights))
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, path)
    base = tiny_base("llama")
    with pytest.raises(ValueError, match="lora_"):
        fqa.QAdapterModel.from_pretrained(base, tmp_path)
    assert not adapter_modules(base)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = bad
    save_file(weights, path)
    base = tiny_base("llama")
    with pytest.raises(ValueError, match="lora_.*not finite.*diverged"):
        fqa.QAdapterModel.from_pretrained(base, tmp_path)
    assert not adapter_modules(base)
    running = trained()
    expected = fingerprint_of_function(running)
    for name in ("second", "default"):
        with pytest.raises(ValueError, match="not finite"):
            running.load_adapter(tmp_path, name)
    assert set(running.peft_config) == {"default"}
    assert_same_function(fingerprint_of_function(running), expected)  # the failed reload is undone


def test_a_failed_load_leaves_the_base_trainable(tmp_path: Path) -> None:
    path = saved(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    base = tiny_base("llama")
    with pytest.raises(ValueError, match="cannot be loaded"):
        fqa.QAdapterModel.from_pretrained(base, tmp_path)
    assert all(parameter.requires_grad for parameter in base.parameters())


class PackedLinear(torch.nn.Module):
    """A quantised layer as GPTQ and AWQ have it: the matrix is a buffer of integers."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.abs().max() / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scale).T


def test_the_fingerprint_of_a_quantised_base_is_of_what_is_not_packed() -> None:
    base = tiny_base("llama")
    plain = fingerprint(base)
    for layer in base.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, PackedLinear(linear))
    packed = fingerprint(base)
    assert packed["body"] is None and packed["head"] == plain["head"]
    check_same_base(plain, packed, "adapter")
    check_same_base(packed, plain, "adapter")


def test_a_base_without_weights_is_refused() -> None:
    with torch.device("meta"):
        base = tiny_base("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM are on the meta device: load them first"):
        fqa.get_qadapter_model(base)


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['nonsense', 'torch_dtype'\]; dtype and device are the base's"):
        fqa.QAdapterModel.from_pretrained(tiny_base("llama"), saved(tmp_path), torch_dtype="float16", nonsense=1)


@each_mode
def test_merging_is_refused(kv_mode: str) -> None:
    model = trained(kv_mode)
    expected = fingerprint_of_function(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert_same_function(fingerprint_of_function(model), expected)
