"""The model card beside a saved adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import fastqadapter as fqa
from tiny import lora_config, tiny_base
from words import save_base, word_tokenizer


def saved(folder: Path, adapter: str = "default", rank: int = 4) -> Path:
    save_base(folder / "base")
    base = type(tiny_base("llama")).from_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    config = fqa.QAdapterConfig(kv_mode="shared", alpha_0=0.75)
    fqa.get_qadapter_model(base, config, lora_config("llama", "shared", r=rank), adapter).save_pretrained(
        folder / "out"
    )
    return folder / "out"


@pytest.mark.parametrize("adapter", ["default", "polite"])
def test_its_snippet_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], adapter: str
) -> None:
    folder = saved(tmp_path, adapter)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == str(tmp_path / "base")
    assert card.data.library_name == "fastqadapter"
    assert "| alpha_0 | 0.75 |" in card.text and "| LoRA rank | 4 |" in card.text
    [snippet] = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    monkeypatch.chdir(folder)
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 40


def test_what_a_user_wrote_is_kept(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    card = ModelCard.load(folder / "README.md")
    card.text = "# Mine"
    card.data.license = "mit"
    card.save(folder / "README.md")
    again = ModelCard.load(saved(tmp_path) / "README.md")
    assert again.text.strip() == "# Mine"
    assert again.data.license == "mit" and again.data.base_model == str(tmp_path / "base")


def test_settings_are_those_of_the_last_save(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    card = ModelCard.load(folder / "README.md")
    card.text = f"# Mine\n{card.text}\nThe end."
    card.save(folder / "README.md")
    again = ModelCard.load(saved(tmp_path, rank=2) / "README.md").text
    assert "| LoRA rank | 2 |" in again and "| LoRA rank | 4 |" not in again
    assert again.strip().startswith("# Mine") and again.strip().endswith("The end.")
    assert again.replace("| LoRA rank | 2 |", "| LoRA rank | 4 |").split() == card.text.split()


@pytest.mark.parametrize("content", [b"---\nbase_model: [x\n: :\n---\nhi", b"\xff\xfe", b"---\n- a\n---\n"])
def test_a_broken_card_costs_no_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_bytes(content)
    folder = saved(tmp_path)
    assert (folder / "adapter_model.safetensors").exists() and (folder / "qadapter_config.json").exists()
    assert (folder / "README.md").read_bytes() == content
    assert "README.md is left as it is" in caplog.text
