"""QAdapterTrainer: checkpoints that survive a kill, resuming, stop at a non-finite loss or gradient."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState

import fastqadapter as fqa
from fastqadapter.monitor import FiniteGuard, last_checkpoint
from fastqadapter.trainer import NonFiniteLossError
from tiny import lora_parameters, tiny_base
from trainers import TOKENIZER, adapter_weights, arguments, make_trainer
from words import word_rows

TESTS = Path(__file__).parent


RUN = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_trainer_failures import KillAfterSave
from trainers import make_trainer
from words import word_rows
trainer = make_trainer(Path({folder!r}), word_rows(8), num_train_epochs=3, save_strategy="steps", save_steps=4,
                       callbacks=[KillAfterSave()] if {kill} else None)
trainer.train(resume_from_checkpoint={resume})
trainer.save_model({folder!r} + "/final")
"""


class KillAfterSave(TrainerCallback):
    """Ends the process as a machine that loses power would, two steps after the first checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def _run(folder: Path, *, kill: bool, resume: bool) -> int:
    script = RUN.format(tests=str(TESTS), folder=str(folder), kill=kill, resume=resume)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True).returncode


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _run(whole, kill=False, resume=False) == 0
    assert _run(broken, kill=True, resume=False) == -signal.SIGKILL
    assert _run(broken, kill=False, resume=True) == 0
    expected = load_file(whole / "final" / "adapter_model.safetensors")
    found = load_file(broken / "final" / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


class Poison(TrainerCallback):
    """Makes the adapter NaN or infinite at the beginning of one step."""

    def __init__(self, step: int, value: float):
        self.step, self.value = step, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            next(iter(lora_parameters(model).values())).data.fill_(self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_at_the_first_non_finite_loss_with_step_rows_and_checkpoint(tmp_path: Path, value: float) -> None:
    trainer = make_trainer(
        tmp_path, word_rows(8), num_train_epochs=2, save_strategy="steps", save_steps=2, callbacks=[Poison(3, value)]
    )
    with pytest.raises(
        NonFiniteLossError, match=r"step 4 in rows row \d, row \d; last good checkpoint: .*checkpoint-2"
    ):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    fqa.QAdapterModel.from_pretrained(tiny_base("llama"), tmp_path / "checkpoint-2")


class BadGradient(TrainerCallback):
    """One infinite number in the gradient of one step, behind a loss that is finite."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(iter(lora_parameters(model).values())).grad[0, 0] = float("nan")


def test_stops_before_a_step_with_a_bad_gradient(tmp_path: Path) -> None:
    """After the step the weights would be NaN, and the checkpoint that is saved next would take the last good one's
    place."""
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, word_rows(8), callbacks=[BadGradient()], **settings)
    with pytest.raises(NonFiniteLossError, match="gradient norm nan at step 4 in rows .*checkpoint-3"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    saved = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert all(tensor.isfinite().all() for tensor in adapter_weights(trainer).values())


def guard_verdict(losses: list[float], gradient: float, others: list[bool]) -> str:
    """What the guard says in a process with these losses and this gradient, beside another with the flags `others`."""
    guard = FiniteGuard(lambda flags: torch.cat([flags, torch.tensor([others])]))
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.full((1, 1), gradient)
    for index, loss in enumerate(losses):
        guard.add(torch.tensor(loss), (f"row {index}",))
    args = SimpleNamespace(fp16=False, output_dir="nowhere")
    try:
        guard.on_pre_optimizer_step(args, TrainerState(), TrainerControl(), model=model)
    except NonFiniteLossError as error:
        return str(error)
    return "go on"


def test_the_guard_blames_the_rows_that_did_it() -> None:
    nan = float("nan")
    assert guard_verdict([1.0, 2.0], 1.0, [True, True]) == "go on"
    assert "loss nan at step 1 in rows row 1;" in guard_verdict([1.0, nan], nan, [True, False])
    # After the gradients of all processes are added up, the other's NaN is in ours; our rows are innocent.
    assert "loss not finite at step 1 in rows of another process;" in guard_verdict([1.0, 2.0], nan, [False, False])
    assert "gradient norm nan at step 1 in rows row 0, row 1;" in guard_verdict([1.0, 2.0], nan, [True, False])


@pytest.mark.parametrize("name", ["style", "default"])
def test_resume_compares_the_adapter_that_is_trained(tmp_path: Path, name: str) -> None:
    def trainer(beta: float) -> fqa.QAdapterTrainer:
        config = fqa.QAdapterConfig(kv_mode="separate", beta=beta)
        model = fqa.get_qadapter_model(tiny_base("llama"), config, adapter_name=name)
        args = arguments(tmp_path / name, max_steps=2, save_strategy="steps", save_steps=1)
        return fqa.QAdapterTrainer(model, args=args, train_dataset=word_rows(4), processing_class=TOKENIZER)

    trainer(0.1).train()
    checkpoint = str(tmp_path / name / "checkpoint-1")
    with pytest.raises(ValueError, match=r"was trained with beta=0\.1, not 0\.7"):
        trainer(0.7).train(resume_from_checkpoint=checkpoint)
    trainer(0.1).train(resume_from_checkpoint=checkpoint)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    next(iter(lora_parameters(trainer.model).values())).data[0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="lora_.*not finite.*not written"):
        trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_resume_with_other_hyper_parameters_is_refused(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **settings).train()
    config, cache = fqa.QAdapterConfig(kv_mode="separate", beta=0.7), tmp_path / "base"
    for checkpoint, step in ((str(tmp_path / "checkpoint-1"), 1), (True, 2)):
        other = make_trainer(tmp_path, config=config, cache_base=str(cache), **settings)
        with pytest.raises(ValueError, match=rf"checkpoint-{step} was trained with beta=0\.1, not 0\.7: resume with"):
            other.train(resume_from_checkpoint=checkpoint)
        assert not cache.exists()  # before any work


def test_last_checkpoint_is_complete_and_of_this_run(tmp_path: Path) -> None:
    assert last_checkpoint(str(tmp_path / "nowhere")) is None
    for step, complete in ((8, True), (24, True), (32, False), (999, True)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "trainer_state.json").touch()
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-999")
    assert last_checkpoint(str(tmp_path), last_step=40) == str(tmp_path / "checkpoint-24")
