"""What happens beside the computation: collating a micro-batch, saving and loading an adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import fastqadapter as fqa
from fastqadapter_benchmarks.peers import steps
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import Settings
from fastqadapter_benchmarks.workload import Row, load_base, lora, pairs

PAIRS = 16


def trl_collator(rows: list[Row]) -> Callable[[], Any]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collator = DataCollatorForPreference(pad_token_id=0)
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    plain = [{key: row[key] for key in keys} for row in rows]
    return lambda: collator(plain)


def test_collator(benchmark: Any, settings: Settings) -> None:
    """Rows that are tokenised -> tensors."""
    rows = pairs(settings, PAIRS)
    packed, padded = fqa.PreferenceCollator(None, None)(rows), steps.pad_rows(rows, 0)
    responses = [token for row in rows for key in ("chosen_ids", "rejected_ids") for token in row[key]]
    assert packed.actions.tolist() == responses, "the packed batch has other responses"
    collator = fqa.PreferenceCollator(None, None)
    title = f"collate {PAIRS} pairs: {packed.input_ids.numel()} tokens packed, {padded.input_ids.numel()} padded"
    race = Race(benchmark, settings, "files", title, pairs=PAIRS)
    race.enter(
        [
            Competitor("fastqadapter, packed", lambda: lambda: collator(rows)),
            Competitor("TRL DataCollatorForPreference", lambda: trl_collator(rows)),
            Competitor("published padding", lambda: lambda: steps.pad_rows(rows, 0)),
        ]
    )
    race.run()


@pytest.fixture
def saved(settings: Settings, tmp_path: Path) -> Iterator[dict[str, tuple[PeftModel, Path]]]:
    """One model of ours and one of PEFT's with the same adapter, each saved to its folder."""
    ours = fqa.get_qadapter_model(load_base(settings.model, settings.device), fqa.QAdapterConfig(), lora())
    targets = list(ours.peft_config["default"].target_modules)
    models = {
        "fastqadapter": ours,
        "PEFT": get_peft_model(load_base(settings.model, settings.device), lora(target_modules=targets)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    yield {name: (model, tmp_path / name) for name, model in models.items()}


def title_of(what: str, folder: Path) -> str:
    size = (folder / "adapter_model.safetensors").stat().st_size
    return f"{what} of {size / 2**20:.1f} MiB"


def test_save(benchmark: Any, settings: Settings, saved: dict[str, tuple[PeftModel, Path]]) -> None:
    race = Race(benchmark, settings, "files", title_of("save an adapter", saved["fastqadapter"][1]))

    def save(name: str) -> Callable[[], Any]:
        model, folder = saved[name]
        return lambda: model.save_pretrained(folder)

    race.enter(Competitor(name, functools.partial(save, name)) for name in saved)
    for name, (model, folder) in saved.items():
        on_disk = load_file(folder / "adapter_model.safetensors")
        expected = get_peft_model_state_dict(model)
        assert on_disk.keys() == expected.keys(), f"{name}: other names on disk"
        assert all(torch.equal(on_disk[key], expected[key].cpu()) for key in expected), f"{name}: other weights on disk"
    race.run()


def test_load(benchmark: Any, settings: Settings, saved: dict[str, tuple[PeftModel, Path]]) -> None:
    """Onto a base model in memory; of it only the modules are copied, for each call has a model of its own."""
    race = Race(benchmark, settings, "files", title_of("load an adapter", saved["fastqadapter"][1]))
    classes = {"fastqadapter": fqa.QAdapterModel, "PEFT": PeftModel}

    def load(name: str) -> Callable[[], Any]:
        return lambda: classes[name].from_pretrained(load_base(settings.model, settings.device), saved[name][1])

    race.enter(Competitor(name, functools.partial(load, name)) for name in classes)
    for name, model in race.results.items():
        assert same_adapter(model, saved[name][0]), f"{name}: another adapter came back"
    race.run()


def same_adapter(one: PeftModel, other: PeftModel) -> bool:
    def weights(model: PeftModel) -> dict[str, Tensor]:
        return {name: each for name, each in model.state_dict().items() if "lora_" in name}

    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
