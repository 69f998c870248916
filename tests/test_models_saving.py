"""Adapters on disk: plain PEFT files and a sidecar, loaded bit for bit in a new process, refused on a wrong base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import fastqadapter as fqa
from fastqadapter.models.base import check_same_base, fingerprint
from tiny import (
    MODES,
    PAD,
    PAIRS,
    lora_config,
    lora_parameters,
    make_twins,
    packed,
    random_ids,
    randomise_adapter,
    tiny_base,
)

NUMBERS = {"alpha_0": 0.7, "alpha_tilde": 1.3, "gamma": 0.9, "beta": 0.1}
PROMPT = torch.tensor([random_ids(9, seed=50)])
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "qadapter_config.json"}
each_mode = pytest.mark.parametrize("kv_mode", MODES)


def trained(kv_mode: str = "shared", name: str = "llama", **settings: Any) -> fqa.QAdapterModel:
    return make_twins(name, kv_mode, **{**NUMBERS, **settings}).model


def saved(folder: Path, kv_mode: str = "shared", name: str = "llama", **settings: Any) -> Path:
    """A folder with a trained adapter."""
    trained(kv_mode, name, **settings).save_pretrained(folder)
    return folder


@torch.no_grad()
def fingerprint_of_function(model: fqa.QAdapterModel) -> dict[str, Tensor]:
    """What a model computes: policy logits, generated tokens, loss."""
    return {
        "logits": model(input_ids=PROMPT, logits_to_keep=1).logits,
        "tokens": model.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=PAD),
        "loss": model(packed(PAIRS, model)).loss[None],
    }


def assert_same_function(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def adapter_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- what is written --------------------------------------------------------------------------------------------------


@each_mode
def test_files_of_an_adapter(kv_mode: str, tmp_path: Path) -> None:
    model = trained(kv_mode)
    model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == FILES  # weights as safetensors, nothing pickled
    sidecar = json.loads((tmp_path / "qadapter_config.json").read_text())
    assert sidecar["format"] == 1 and sidecar["kv_mode"] == kv_mode
    assert {key: sidecar[key] for key in NUMBERS} == NUMBERS
    assert sidecar["base"]["architecture"] == "LlamaForCausalLM" and sidecar["base"]["num_hidden_layers"] == 3
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == len(lora_parameters(model)) and all("lora_" in name for name in weights)


@each_mode
def test_peft_itself_reads_the_folder(kv_mode: str, tmp_path: Path) -> None:
    """`adapter_config.json` is what PEFT writes for the same adapter, and PEFT loads the folder without a warning."""
    twins = make_twins("llama", kv_mode)
    twins.model.save_pretrained(tmp_path / "ours")
    twins.adapted.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("ours", "theirs"))
    for content in (ours, theirs):
        content["target_modules"] = sorted(content["target_modules"])
    assert ours == theirs
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = PeftModel.from_pretrained(tiny_base("llama"), str(tmp_path / "ours"))
    with torch.no_grad():
        expected = twins.adapted(input_ids=PROMPT).logits
        torch.testing.assert_close(plain(input_ids=PROMPT).logits, expected)


def test_no_pickle(tmp_path: Path) -> None:
    for arguments in ((False,), ()):
        keywords = {} if arguments else {"safe_serialization": False}
        with pytest.raises(ValueError, match="safetensors only"):
            trained().save_pretrained(tmp_path, *arguments, **keywords)
    assert files_of(tmp_path) == set()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not tmp_path.joinpath("adapter").exists() or files_of(tmp_path / "adapter") == set()


# --- loading ----------------------------------------------------------------------------------------------------------

LOADER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
import fastqadapter as fqa
from test_models_saving import fingerprint_of_function

for folder in map(Path, sys.argv[1:]):
    model = fqa.QAdapterModel.from_pretrained(str(folder / "base"), folder / "adapter")
    save_file(fingerprint_of_function(model), folder / "found.safetensors")
"""


def test_a_new_process_computes_bit_for_bit_the_same(tmp_path: Path) -> None:
    cases = [("llama", mode) for mode in MODES] + [("gemma2", "prompt"), ("gemma3", "separate"), ("gpt_oss", "shared")]
    expected = {}
    for name, kv_mode in cases:
        folder = tmp_path / f"{name}-{kv_mode}"
        tiny_base(name).save_pretrained(folder / "base")
        saved(folder / "adapter", kv_mode, name)
        # Loaded here too: where a weight lies in memory can change the last bit of a product with it.
        model = fqa.QAdapterModel.from_pretrained(str(folder / "base"), folder / "adapter")
        expected[folder] = fingerprint_of_function(model)
        torch.testing.assert_close(expected[folder], fingerprint_of_function(trained(kv_mode, name)))
    # The same packages as here: a source tree has no native library, where an installed package has one.
    search = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(
        [sys.executable, "-c", LOADER, *map(str, expected)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    for folder, function in expected.items():
        assert_same_function(load_file(folder / "found.safetensors"), function)


@each_mode
def test_loaded_for_inference_or_to_train_on(kv_mode: str, tmp_path: Path) -> None:
    expected = fingerprint_of_function(trained(kv_mode))
    folder = saved(tmp_path, kv_mode)
    frozen = fqa.QAdapterModel.from_pretrained(tiny_base("llama"), folder)
    assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())
    assert frozen.qadapter_config == fqa.QAdapterConfig(kv_mode=kv_mode, **NUMBERS)
    trainable = fqa.QAdapterModel.from_pretrained(tiny_base("llama"), folder, is_trainable=True)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in trainable.named_parameters())
    for model in (frozen, trainable):
        assert_same_function(fingerprint_of_function(model), expected)


@each_mode
def test_training_goes_on_where_it_stopped(kv_mode: str, tmp_path: Path) -> None:
    def step(model: fqa.QAdapterModel) -> None:
        model.zero_grad(set_to_none=True)
        model.train()(packed(PAIRS, model)).loss.backward()
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter -= 0.1 * parameter.grad

    model = trained(kv_mode)
    step(model)
    model.save_pretrained(tmp_path)
    resumed = fqa.QAdapterModel.from_pretrained(tiny_base("llama"), tmp_path, is_trainable=True)
    for each in (model, resumed):
        step(each)
    for name, parameter in lora_parameters(model).items():
        assert torch.equal(lora_parameters(resumed)[name], parameter), name


def test_saving_what_was_loaded_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "first", "prompt", preset="paper")
    fqa.QAdapterModel.from_pretrained(tiny_base("llama"), tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("qadapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_settings_of_a_preset_survive(tmp_path: Path) -> None:
    config = {"preset": "reference", "divisor": "8", "regularizer": "pair", "beta": 0.25}
    model = fqa.QAdapterModel.from_pretrained(tiny_base("llama"), saved(tmp_path, "separate", **config))
    assert model.qadapter_config == fqa.QAdapterConfig(kv_mode="separate", **{**NUMBERS, **config})


# --- several adapters -------------------------------------------------------------------------------------------------


def two_adapters(kv_mode: str) -> fqa.QAdapterModel:
    model = make_twins("llama", kv_mode, adapters=("default", "polite"), **NUMBERS).model
    model.qadapter_configs["polite"] = fqa.QAdapterConfig(kv_mode=kv_mode, alpha_0=0.1)
    return model


@torch.no_grad()
def mixtures(model: fqa.QAdapterModel) -> dict[str, Tensor]:
    weights = [{"default": 1.0}, {"polite": 1.0}, {"default": 0.5, "polite": -0.5}]
    return {
        str(each): model.generate(
            PROMPT,
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=PAD,
            adapters=each,
            output_logits=True,
            return_dict_in_generate=True,
        ).logits[0]
        for each in weights
    }


@each_mode
def test_several_adapters_in_one_folder(kv_mode: str, tmp_path: Path) -> None:
    model = two_adapters(kv_mode)
    model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == FILES | {f"polite/{name}" for name in FILES - {"README.md"}}
    expected = mixtures(model)
    loaded = fqa.QAdapterModel.from_pretrained(tiny_base("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "polite", "polite")
    assert loaded.qadapter_configs == model.qadapter_configs
    assert_same_function(mixtures(loaded), expected)
    by_subfolder = fqa.QAdapterModel.from_pretrained(tiny_base("llama"), tmp_path, "polite", subfolder="polite")
    by_subfolder.load_adapter(tmp_path, "default")
    assert by_subfolder.qadapter_configs == model.qadapter_configs
    by_subfolder.set_adapter("default")  # its alphas are the ones in force
    assert_same_function(mixtures(by_subfolder), expected)


def test_selected_adapters(tmp_path: Path) -> None:
    two_adapters("shared").save_pretrained(tmp_path, selected_adapters=["polite"])
    assert {name for name in files_of(tmp_path) if "README" not in name} == {
        f"polite/{name}" for name in FILES - {"README.md"}
    }


@each_mode
def test_deleted_adapter_is_gone(kv_mode: str, tmp_path: Path) -> None:
    model = two_adapters(kv_mode)
    alone = trained(kv_mode)
    model.set_adapter("polite")
    model.delete_adapter("polite")
    assert set(model.qadapter_configs) == set(model.peft_config) == {"default"}
    model.set_adapter("default")
    assert_same_function(fingerprint_of_function(model), fingerprint_of_function(alone))
    with pytest.raises(ValueError, match=r"\['polite'\] are not loaded"):
        model.generate(PROMPT, adapters={"polite": 1.0})
    model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == FILES


def test_loading_again_replaces_the_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    model = trained()
    expected = fingerprint_of_function(model)
    randomise_adapter(model, seed=99)
    assert not torch.equal(fingerprint_of_function(model)["logits"], expected["logits"])
    model.load_adapter(tmp_path, "default")
    assert_same_function(fingerprint_of_function(model), expected)


@each_mode
def test_second_adapter_on_other_layers(kv_mode: str, tmp_path: Path) -> None:
    """The trunk ends at the lowest adapted layer of all adapters, loaded ones included, in any order."""
    low = make_twins("llama", kv_mode, lora={"layers_to_transform": [0]}).model
    high = make_twins("llama", kv_mode, lora={"layers_to_transform": [2]}).model
    low.save_pretrained(tmp_path / "low")
    high.save_pretrained(tmp_path / "high")
    expected = {"low": fingerprint_of_function(low), "high": fingerprint_of_function(high)}
    for first, second in (("low", "high"), ("high", "low")):
        model = fqa.QAdapterModel.from_pretrained(tiny_base("llama"), tmp_path / first, first)
        model.load_adapter(tmp_path / second, second)
        for adapter in (first, second):
            model.set_adapter(adapter)
            found = fingerprint_of_function(model)
            assert torch.equal(found["tokens"], expected[adapter]["tokens"])
            torch.testing.assert_close(found["loss"], expected[adapter]["loss"])


# --- refused ----------------------------------------------------------------------------------------------------------


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
