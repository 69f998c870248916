"""Adapters on disk: plain PEFT files and a sidecar, loaded bit for bit in a new process, several in one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import fastqadapter as fqa
from generation_cases import each_mode
from saved_adapters import (
    NUMBERS,
    PROMPT,
    assert_same_function,
    files_of,
    fingerprint_of_function,
    saved,
    trained,
)
from tiny import (
    MODES,
    PAD,
    PAIRS,
    lora_parameters,
    make_twins,
    packed,
    randomise_adapter,
    tiny_base,
)

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "qadapter_config.json"}


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
from saved_adapters import fingerprint_of_function

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
