"""The folder that vLLM serves, and the command that writes it. Needs no vLLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fastqadapter as fqa
from fastqadapter.cli import main
from fastqadapter.integrations.vllm.export import export_for_vllm
from fastqadapter.integrations.vllm.served import Served, ServedAdapter
from fastqadapter.integrations.vllm.weights import read_adapter
from serving import ADAPTERS, save_adapters, save_tiny
from tiny import tiny_base
from words import word_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with two adapters in `shared` mode."""
    root = tmp_path_factory.mktemp("trained")
    save_adapters(save_tiny(root / "base", "llama"), root, "shared")
    return root


def adapters_of(trained: Path) -> dict[str, Path]:
    return {name: trained / name for name in ADAPTERS}


def test_folder_holds_base_and_adapters(trained: Path, tmp_path: Path) -> None:
    folder = export_for_vllm(trained / "base", adapters_of(trained), tmp_path / "served", max_adapters=2)
    served = Served.read(folder)
    assert served.adapters == {"polite": ServedAdapter(1.0, 1.0), "brief": ServedAdapter(0.8, 1.5)}
    assert (served.kv_mode, served.max_adapters) == ("shared", 2)
    assert AutoConfig.from_pretrained(folder).architectures == ["QAdapterLlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(folder).get_vocab()
    weights = folder / "model.safetensors"
    assert weights.is_symlink() and weights.resolve() == (trained / "base" / "model.safetensors").resolve()
    model = AutoModelForCausalLM.from_pretrained(folder)  # the base itself, as every tool reads it
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(trained / "base").num_parameters()
    assert read_adapter(folder / "adapters" / "brief").keys() == read_adapter(trained / "brief").keys()


def test_copy_can_be_moved(trained: Path, tmp_path: Path) -> None:
    folder = export_for_vllm(trained / "base", adapters_of(trained), tmp_path / "served", copy=True)
    assert not any(file.is_symlink() for file in folder.rglob("*"))


def test_export_replaces_an_earlier_one_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    folder = export_for_vllm(trained / "base", adapters_of(trained), tmp_path / "served")
    export_for_vllm(trained / "base", {"polite": trained / "polite"}, folder)
    assert Served.read(folder).names == ["polite"] and not (folder / "adapters" / "brief").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds something else"):
        export_for_vllm(trained / "base", adapters_of(trained), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_weights_of_an_adapter_are_scaled(trained: Path) -> None:
    pairs, raw = read_adapter(trained / "brief"), load_file(trained / "brief" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = pairs[name]
    torch.testing.assert_close(a, raw[f"base_model.model.{name}.lora_A.weight"])
    torch.testing.assert_close(b, raw[f"base_model.model.{name}.lora_B.weight"] * 16 / 4)


def edited(trained: Path, tmp_path: Path, edit: Callable[[Path], object]) -> dict[str, Path]:
    folder = tmp_path / "edited"
    shutil.copytree(trained / "brief", folder)
    edit(folder)
    return {"polite": trained / "polite", "edited": folder}


def peft_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def weights(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, min(key for key in tensors if "lora_B" in key))
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"torn"), "cannot be loaded"),
        (weights(lambda tensors, key: tensors[key].fill_(float("nan"))), "are not finite"),
        (weights(lambda tensors, key: tensors.pop(key)), "the weight file misses"),
        (weights(lambda tensors, key: tensors.update({key.replace("lora_B", "lora_C"): torch.ones(1)})), "lora_C"),
        (weights(lambda tensors, key: tensors.clear()), "no LoRA weights"),
        (peft_config(bias="all"), "bias"),
    ],
    ids=["no weights", "no config", "torn", "NaN", "no B", "unknown", "empty", "bias"],
)
def test_adapters_that_cannot_be_served(
    trained: Path, tmp_path: Path, edit: Callable[[Path], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        export_for_vllm(trained / "base", edited(trained, tmp_path, edit), tmp_path / "served")
    assert len(str(error.value).splitlines()) == 1 and "edited" in str(error.value)
    assert not (tmp_path / "served").exists()


def test_adapter_of_another_base(trained: Path, tmp_path: Path) -> None:
    adapters = save_adapters(save_tiny(tmp_path / "base", "llama", intermediate_size=64), tmp_path, "shared")
    with pytest.raises(ValueError, match="polite"):
        export_for_vllm(trained / "base", {"polite": adapters["polite"]}, tmp_path / "served")


def test_prompt_mode_cannot_be_served(trained: Path, tmp_path: Path) -> None:
    adapters = save_adapters(trained / "base", tmp_path, "prompt")
    with pytest.raises(ValueError, match="kv_mode='prompt', which vLLM cannot serve"):
        export_for_vllm(trained / "base", adapters, tmp_path / "served")


def test_separate_mode_mixes_no_adapters(trained: Path, tmp_path: Path) -> None:
    adapters = save_adapters(trained / "base", tmp_path, "separate")
    for kv_mode, most in (("shared", 3), ("separate", 0)):
        with pytest.raises(ValueError, match=r"max_adapters=\d is outside its legal range \[1, 2\]"):
            export_for_vllm(trained / "base", adapters, tmp_path / kv_mode, max_adapters=most)
    with pytest.raises(ValueError, match="a request can use one adapter"):
        export_for_vllm(trained / "base", adapters, tmp_path / "served", max_adapters=2)
    assert Served.read(export_for_vllm(trained / "base", adapters, tmp_path / "served")).kv_mode == "separate"


@pytest.mark.parametrize("name", ["", "a/b", "..", "a=b", "a,b", ".hidden", "a b", "a\nb", "é", "a" * 101])
def test_names_that_no_request_could_say(trained: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="adapter name"):
        export_for_vllm(trained / "base", {name: trained / "polite"}, tmp_path / "served")


@pytest.mark.parametrize(
    ("remove", "message"), [("model.safetensors", "no weights as safetensors"), ("config.json", "config.json")]
)
def test_base_without_its_files(trained: Path, tmp_path: Path, remove: str, message: str) -> None:
    shutil.copytree(trained / "base", tmp_path / "base")
    (tmp_path / "base" / remove).unlink()
    with pytest.raises(ValueError, match=message):
        export_for_vllm(tmp_path / "base", adapters_of(trained), tmp_path / "served")


def test_logit_scale_of_the_base(tmp_path: Path) -> None:
    """Granite divides its logits; vLLM's Transformers backend is told so by our entry."""
    base = save_tiny(tmp_path / "base", "granite")
    folder = export_for_vllm(base, save_adapters(base, tmp_path, "shared", "granite"), tmp_path / "served")
    served, config = Served.read(folder), AutoConfig.from_pretrained(folder)
    assert served.logit_scale == pytest.approx(1 / config.logits_scaling) and served.logit_scale != 1.0
    assert config.architectures == ["QAdapterTransformersForCausalLM"]


def test_files_in_formats_of_others_stay_behind(trained: Path, tmp_path: Path) -> None:
    """By `params.json` vLLM would take the folder for one in Mistral's own format: the plain base, without a word."""
    shutil.copytree(trained / "base", tmp_path / "base")
    for name in ("params.json", "consolidated.safetensors", "pytorch_model.bin"):
        (tmp_path / "base" / name).write_bytes(b"{}")
    folder = export_for_vllm(tmp_path / "base", adapters_of(trained), tmp_path / "served")
    names = {file.name for file in folder.iterdir()}
    assert names.isdisjoint({"params.json", "consolidated.safetensors", "pytorch_model.bin"})


def test_export_touches_nothing_that_it_is_made_of(trained: Path, tmp_path: Path) -> None:
    folder = export_for_vllm(trained / "base", adapters_of(trained), tmp_path / "served", copy=True)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for base, output in (
        (folder, folder),
        (trained / "base", trained),
        (trained / "base", trained / "base" / "inside"),
    ):
        with pytest.raises(ValueError, match="the export cannot lie in, hold or be|holds something else"):
            export_for_vllm(base, {"polite": folder / "adapters" / "polite"}, output)
    with pytest.raises(ValueError, match="is an export itself: name its base"):
        export_for_vllm(folder, adapters_of(trained), tmp_path / "again")
    (tmp_path / "again.part").mkdir()
    (tmp_path / "link").symlink_to(folder)
    export_for_vllm(trained / "base", adapters_of(trained), tmp_path / "link", copy=True)
    assert {file: file.read_bytes() for file in before} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.part", "link", "served"]


def test_nothing_is_left_of_an_export_that_fails(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        export_for_vllm(trained / "base", adapters_of(trained), tmp_path / "served")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "message"), [("phi", "a bias in its LM head"), ("gpt_oss", "experts"), ("gemma2", "soft-cap")]
)
def test_bases_that_vllm_cannot_serve(tmp_path: Path, architecture: str, message: str) -> None:
    base = tmp_path / "base"
    tiny_base(architecture).save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    adapters = save_adapters(base, tmp_path, "shared", architecture)
    with pytest.raises(ValueError, match=message):
        export_for_vllm(base, adapters, tmp_path / "served")


@pytest.mark.parametrize("content", ["7", "[]", "{bad", "{}"])
def test_base_with_a_damaged_config(trained: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(trained / "base", tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config"):
        export_for_vllm(tmp_path / "base", adapters_of(trained), tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_serve_names_what_is_wrong(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "base", tmp_path / "base")
    folder = export_for_vllm(tmp_path / "base", adapters_of(trained), tmp_path / "served")
    assert main(["serve", "--port", "8000", str(folder)]) == 2
    assert "the folder is the first argument" in capsys.readouterr().err
    shutil.move(tmp_path / "base", tmp_path / "moved")
    assert main(["serve", str(folder)]) == 2
    assert "which has gone: export again, or with --copy" in capsys.readouterr().err


def test_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "served"
    named = [f"{name}={trained / name}" for name in ADAPTERS]
    assert (
        main(["export-vllm", "--adapter", *named, "--output", str(output)]) == 0
    )  # the base is in the adapter's config
    assert f"next: fastqadapter serve {output}" in capsys.readouterr().out
    assert Served.read(output).names == list(ADAPTERS)
    for arguments, message in (
        ([str(trained / "polite"), str(trained / "brief")], "is given twice"),
        ([f"polite={tmp_path / 'nowhere'}"], "nowhere"),
    ):
        assert main(["export-vllm", "--adapter", *arguments, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert Served.read(output).names == list(ADAPTERS)


def test_dora_is_no_q_adapter_that_vllm_serves(trained: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    wrapped = fqa.get_qadapter_model(model, fqa.QAdapterConfig(kv_mode="separate"), lora)
    wrapped.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="use_dora"):
        export_for_vllm(trained / "base", {"dora": tmp_path / "dora"}, tmp_path / "served")
