"""The base's states kept on disk: the same training without the base pass, and whatever can be wrong with a folder."""

from __future__ import annotations

import errno
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastqadapter as fqa
from fastqadapter import base_cache
from fastqadapter.data import tokenize_rows
from tiny import lora_config, tiny_base
from trainers import TOKENIZER, adapter_weights, make_trainer
from words import save_workplace, word_rows

# The large epsilon takes the sign of gradients that are but rounding out of Adam's weights.
EPOCHS = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 1.0, "adam_epsilon": 1.0}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_cache, "PAIRS_PER_SHARD", 2)
    monkeypatch.setattr(base_cache, "TOKENS_AT_ONCE", 30)


@pytest.fixture
def model() -> fqa.QAdapterModel:
    return fqa.get_qadapter_model(
        tiny_base("llama"), fqa.QAdapterConfig(kv_mode="separate"), lora_config("llama", "separate")
    )


def rows(count: int = 5, seed: int = 0) -> Any:
    return tokenize_rows(word_rows(count, seed=seed), TOKENIZER, max_length=None)


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}


def test_under_autocast_an_untrained_adapter_is_the_base(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, bf16=True, cache_base=str(tmp_path / "base"), max_steps=1, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["chi2_loss"] < 1e-10
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("preset", ["default", "reference"])
@pytest.mark.parametrize("workers", [0, 1])
def test_trains_the_same_without_the_base_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: Any, workers: int
) -> None:
    config = fqa.QAdapterConfig(kv_mode="separate", preset=preset)
    found, passes = [], []
    for name, settings in {"plain": {}, "cached": {"cache_base": str(tmp_path / "base")}}.items():
        trainer = make_trainer(tmp_path / name, config=config, dataloader_num_workers=workers, **EPOCHS, **settings)
        run, count = trainer.model.streams._run, []
        monkeypatch.setattr(
            trainer.model.streams, "_run", lambda *args, run=run, count=count: count.append(1) or run(*args)
        )
        trainer.train()
        found.append(
            (adapter_weights(trainer), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        )
        passes.append(len(count))
    (weights, losses), (cached_weights, cached_losses) = found
    assert cached_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(cached_weights[name], weight, rtol=1e-3, atol=1e-5)
    shards = 3  # of 6 pairs
    assert passes[0] == 12
    assert 6 + shards <= passes[1] <= 6 + 2 * shards  # two epochs of the Q pass, and each pair once through the base


def test_states_are_those_of_the_base(tmp_path: Path, model: fqa.QAdapterModel) -> None:
    cached = base_cache.cached_rows(model, rows(), tmp_path)
    assert sorted(written(tmp_path)) == [f"base-0000{shard}.safetensors" for shard in range(3)]
    for index in (0, 4, 1):
        row = cached[index]
        batch = fqa.PreferenceCollator(None, None)([row])
        assert batch.base is not None
        _, hidden = model.hidden_states(fqa.PreferenceCollator(None, None)([cached.rows[index]]))
        torch.testing.assert_close(batch.base.hidden, hidden)
        lse = (hidden @ model.get_output_embeddings().weight.T).logsumexp(dim=-1)
        torch.testing.assert_close(batch.base.lse, lse)


def test_goes_on_where_it_was_killed_and_computes_nothing_twice(tmp_path: Path, model: fqa.QAdapterModel) -> None:
    base_cache.cached_rows(model, rows(), tmp_path)
    before = written(tmp_path)
    (tmp_path / "base-00001.safetensors").unlink()
    (tmp_path / "base-00001.there-7.part").write_bytes(b"torn")
    base_cache.cached_rows(model, rows(), tmp_path)
    after = written(tmp_path)
    assert set(after) == {*before, "base-00001.there-7.part"}
    assert [name for name in before if after[name] != before[name]] == ["base-00001.safetensors"]


def test_processes_share_the_work(tmp_path: Path, model: fqa.QAdapterModel) -> None:
    """Whatever the second finds of the first's work when it begins."""
    first = base_cache.cached_rows(model, rows(), tmp_path, process=0, processes=2)
    assert first.missing() == ["base-00001.safetensors"]
    second = base_cache.cached_rows(model, rows(), tmp_path, process=1, processes=2)
    assert second.missing() == []


def test_other_data_model_or_mode_is_refused(tmp_path: Path, model: fqa.QAdapterModel) -> None:
    base_cache.cached_rows(model, rows(), tmp_path)
    with pytest.raises(ValueError, match="base-00000.safetensors is of another base model, other training data"):
        base_cache.cached_rows(model, rows(seed=1), tmp_path)
    config = fqa.QAdapterConfig(kv_mode="separate")
    for other in (tiny_base("llama", seed=1), tiny_base("llama", rms_norm_eps=1e-3)):
        with pytest.raises(ValueError, match="another base model"):
            base_cache.cached_rows(fqa.get_qadapter_model(other, config), rows(), tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        base_cache.cached_rows(model, rows(), tmp_path, precision="bf16")
    shared = fqa.get_qadapter_model(tiny_base("llama"))
    with pytest.raises(ValueError, match="in kv_mode='shared' every step needs the K/V of the base pass"):
        base_cache.cached_rows(shared, rows(), tmp_path)
    batch = fqa.PreferenceCollator(None, None)([base_cache.cached_rows(model, rows(), tmp_path)[0]])
    with pytest.raises(ValueError, match="the batch brings base states"):
        shared(batch)


def test_shard_that_another_run_has_put_there(tmp_path: Path, model: fqa.QAdapterModel) -> None:
    cached = base_cache.cached_rows(model, rows(), tmp_path)
    other = base_cache.cached_rows(model, rows(seed=1), tmp_path / "other")
    shard = "base-00000.safetensors"
    (tmp_path / "other" / shard).replace(tmp_path / shard)
    with pytest.raises(ValueError, match="base-00000.safetensors is of another base model, other training data"):
        cached[0]
    with pytest.raises(ValueError, match="base-00000.safetensors is gone"):
        other[0]
    few = {"hidden": torch.zeros(3, 32), "lse": torch.zeros(3)}
    base_cache.save_file(few, tmp_path / shard, {base_cache.FINGERPRINT: cached.fingerprint})
    with pytest.raises(ValueError, match="does not hold the states of its pairs: delete it"):
        cached[0]


def test_a_file_that_is_none(tmp_path: Path, model: fqa.QAdapterModel) -> None:
    (tmp_path / "base-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"base-00000.safetensors cannot be read .*: delete it"):
        base_cache.cached_rows(model, rows(), tmp_path)


def test_no_room_is_known_before_the_work(
    tmp_path: Path, model: fqa.QAdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = base_cache.CachedRows(rows(), tmp_path, None, "").ends[-1]
    free = states * (32 * 4 + 4) - 1  # a byte too few for D = 32 numbers in fp32 and the lse
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(base_cache.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="the base states take 0 MiB and 0 MiB are free: make room, or leave the option"):
        base_cache.cached_rows(model, rows(), tmp_path)
    assert not written(tmp_path)
    usage.free += 1
    base_cache.cached_rows(model, rows(), tmp_path)


def test_disk_that_runs_full_leaves_no_torn_file(
    tmp_path: Path, model: fqa.QAdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = base_cache.save_file, []

    def full_at_the_second(tensors: Any, path: Path, metadata: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"the first half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(base_cache, "save_file", full_at_the_second)
    with pytest.raises(OSError, match=r"base-00001.safetensors cannot be written .*No space left.*: start again"):
        base_cache.cached_rows(model, rows(), tmp_path)
    assert list(written(tmp_path)) == ["base-00000.safetensors"]
    base_cache.cached_rows(model, rows(), tmp_path)
    assert len(calls) == 4  # the first shard was kept
    assert len(written(tmp_path)) == 3


def test_parts_of_killed_runs_are_removed(tmp_path: Path, model: fqa.QAdapterModel) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    parts = {
        tmp_path / f"base-00005.{here}-{gone.pid}.part": 7200,
        tmp_path / f"base-00006.{here}-{gone.pid}.part": 0,  # just written: by a container of the same name?
        tmp_path / f"base-00007.{here}-{os.getpid()}.part": 7200,
        tmp_path / f"base-00008.{here}-2-{gone.pid}.part": 7200,  # another machine
    }
    for part, age in parts.items():
        part.touch()
        os.utime(part, (time.time() - age,) * 2)
    left, *others = parts
    base_cache.cached_rows(model, rows(), tmp_path)
    assert not left.exists() and all(part.exists() for part in others)


def test_rows_that_training_would_cut_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, rows(), cache_base=str(tmp_path / "base"), max_length=5)
    with pytest.raises(ValueError, match="rows of .* tokens, which max_length=5 would cut"):
        trainer.train()
    assert not (tmp_path / "base").exists()
    make_trainer(tmp_path, rows(), cache_base=str(tmp_path / "base"), max_length=0, max_steps=1).train()  # no limit


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastqadapter import cli

    save_workplace(tmp_path, rows=4)
    options = ["--model_name_or_path", str(tmp_path / "base"), "--dataset_name", str(tmp_path / "pairs.jsonl")]
    options += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--cache-base", str(tmp_path / "cache")]
    assert cli.main(["train", *options]) == 2
    assert "in kv_mode='shared' every step needs" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["train", *options, "--kv_mode", "separate"]) == 0
    assert len(written(tmp_path / "cache")) == 2
