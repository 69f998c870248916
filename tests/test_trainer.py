"""QAdapterTrainer: exact accumulation, metrics, checkpoints that survive a kill, stop at a non-finite loss."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import fastqadapter as fqa
from fastqadapter.data import tokenize_rows
from fastqadapter.monitor import FiniteGuard, last_checkpoint
from fastqadapter.trainer import NonFiniteLossError
from tiny import lora_parameters, tiny_base
from words import save_base, word_rows, word_tokenizer

TOKENIZER = word_tokenizer()
TESTS = Path(__file__).parent


def arguments(folder: Path, **settings) -> fqa.QAdapterTrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
    }
    return fqa.QAdapterTrainingArguments(**{**defaults, **settings})


def make_trainer(folder: Path, rows=None, eval_dataset=None, *, config=None, callbacks=None, **settings):
    torch.manual_seed(0)
    return fqa.QAdapterTrainer(
        model=tiny_base("llama"),
        args=arguments(folder, **settings),
        train_dataset=word_rows(6) if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
        callbacks=callbacks,
        qadapter_config=config or fqa.QAdapterConfig(kv_mode="separate", beta=0.1),
    )


def adapter_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lora_parameters(trainer.model).items()}


@pytest.mark.parametrize("kv_mode", ["separate", "prompt", "shared"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_accumulation_gives_the_gradient_of_one_large_batch(tmp_path: Path, kv_mode: str, preset: str) -> None:
    """6 pairs as 6, as 2+2+2, and as 4+2: a last micro-batch of another size must not weigh more. One plain SGD step
    with rate 1 moves the weights by the gradient itself."""
    config = fqa.QAdapterConfig(kv_mode=kv_mode, preset=preset, beta=0.1)
    moved = []
    for size, accumulate in ((6, 1), (2, 3), (4, 2)):
        trainer = make_trainer(
            tmp_path,
            config=config,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
        before = adapter_weights(trainer)
        trainer.train()
        assert trainer.state.global_step == 1
        after = adapter_weights(trainer)
        moved.append(torch.cat([(after[name] - before[name]).flatten() for name in before]))
    assert moved[0].norm() > 0
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=1e-4, atol=1e-6 * moved[0].abs().max().item() + 1e-8)


def test_logs_metrics_by_their_trl_names(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=word_rows(5, seed=9), num_train_epochs=1, eval_strategy="epoch")
    trainer.train()
    names = {"pref_loss", "chi2_loss", "q_values/mean", "values/mean"}
    names |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    names |= {"logps/chosen", "logps/rejected", "loss"}
    first = trainer.state.log_history[0]
    assert names | {"grad_norm", "learning_rate", "epoch"} <= set(first)
    [evaluated] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {f"eval_{name}" for name in names} <= set(evaluated)
    assert first["pref_loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert first["rewards/accuracies"] == pytest.approx(0.5)  # an untrained adapter is at chance


def test_evaluation_is_the_mean_over_pairs_whatever_the_batches(tmp_path: Path) -> None:
    """5 pairs in batches of 2, the last one alone: Trainer itself would count that one twice."""
    results = []
    for size in (1, 2, 5):
        trainer = make_trainer(tmp_path, eval_dataset=word_rows(5, seed=9), per_device_eval_batch_size=size)
        torch.manual_seed(3)
        for parameter in lora_parameters(trainer.model).values():
            parameter.data.normal_(std=0.2)
        results.append(trainer.evaluate())
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-5)
        assert results[2][name] == pytest.approx(results[0][name], rel=1e-5)


def test_several_evaluation_sets(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset={"a": word_rows(2, seed=1), "b": word_rows(3, seed=2)})
    metrics = trainer.evaluate()
    assert {"eval_a_pref_loss", "eval_b_pref_loss"} <= set(metrics)


def test_training_learns_and_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    rows = word_rows(6)
    trainer = make_trainer(
        tmp_path,
        rows,
        eval_dataset=rows,
        num_train_epochs=6,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_pref_loss",
        greater_is_better=False,
    )
    before = trainer.evaluate()["eval_pref_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_pref_loss"] < 0.5 * before
    assert after["eval_rewards/accuracies"] == 1.0
    assert (Path(trainer.state.best_model_checkpoint) / "qadapter_config.json").is_file()


RUN = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_trainer import KillAfterSave, make_trainer
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


def test_a_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    class Halved(fqa.QAdapterTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(inputs).loss / 2

    args = {"args": arguments(tmp_path, max_steps=2), "train_dataset": word_rows(4), "processing_class": TOKENIZER}
    trainer = Halved(tiny_base("llama"), **args)
    trainer.train()
    assert trainer.state.global_step == 2


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


def test_an_empty_evaluation_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^eval_dataset: no row left"):
        make_trainer(tmp_path, eval_dataset=[])


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    next(iter(lora_parameters(trainer.model).values())).data[0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="lora_.*not finite.*not written"):
        trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_resume_with_other_hyper_parameters_is_refused(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **settings).train()
    other = make_trainer(tmp_path, config=fqa.QAdapterConfig(kv_mode="separate", beta=0.7), **settings)
    with pytest.raises(ValueError, match=r"checkpoint-1 was trained with beta=0\.1, not 0\.7: resume with the same"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_metrics_of_one_run_do_not_leak_into_the_next(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    first = [entry["pref_loss"] for entry in trainer.state.log_history if "pref_loss" in entry]
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=2)
    trainer._train_means.add({"pref_loss": torch.tensor([1000.0])})  # as a run leaves it that ends between two logs
    trainer.train()
    assert [entry["pref_loss"] for entry in trainer.state.log_history if "pref_loss" in entry] == first


def test_the_seed_decides_the_adapter(tmp_path: Path) -> None:
    made = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(made))  # whatever was drawn before does not matter
        args = arguments(tmp_path, seed=seed)
        rows = {"train_dataset": word_rows(2), "processing_class": TOKENIZER}
        made.append(adapter_weights(fqa.QAdapterTrainer(tiny_base("llama"), args=args, **rows)))
    names = [name for name in made[0] if "lora_A" in name]
    assert all(torch.equal(made[0][name], made[1][name]) for name in names)
    assert not any(torch.equal(made[0][name], made[2][name]) for name in names)


def test_last_checkpoint_is_complete_and_of_this_run(tmp_path: Path) -> None:
    assert last_checkpoint(str(tmp_path / "nowhere")) is None
    for step, complete in ((8, True), (24, True), (32, False), (999, True)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "trainer_state.json").touch()
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-999")
    assert last_checkpoint(str(tmp_path), last_step=40) == str(tmp_path / "checkpoint-24")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 has no meaning"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no meaning"),
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"on_bad_row": "drop"}, "on_bad_row='drop'"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)
    assert arguments(tmp_path, max_length=0).max_length is None


def test_arguments_of_the_wrong_type(tmp_path: Path) -> None:
    good = {"model": tiny_base("llama"), "args": arguments(tmp_path), "processing_class": TOKENIZER}
    for bad, message in (
        ({"args": TrainingArguments(str(tmp_path))}, "args is a TrainingArguments"),
        ({"train_dataset": "rows.jsonl"}, r"string 'rows.jsonl': give rows, of a file by read_rows\('rows.jsonl'\)"),
        ({"processing_class": word_tokenizer(extra=50)}, "tokenizer has .* tokens, the model embeddings for 97"),
    ):
        with pytest.raises(ValueError, match=message):
            fqa.QAdapterTrainer(**{**good, "model": tiny_base("llama"), **bad})


def test_constructor_of_trl(tmp_path: Path) -> None:
    common = {"model": tiny_base("llama"), "args": arguments(tmp_path), "train_dataset": word_rows(2)}
    common |= {"processing_class": TOKENIZER, "quantization_config": None}
    fqa.QAdapterTrainer(**common, ref_model=None, compute_metrics=None)
    for name in ("ref_model", "compute_metrics"):
        with pytest.raises(ValueError, match=name):
            fqa.QAdapterTrainer(**{**common, "model": tiny_base("llama")}, **{name: lambda *_: None})
    with pytest.raises(ValueError, match="quantization_config is for a model given by name"):
        fqa.QAdapterTrainer(**{**common, "model": tiny_base("llama"), "quantization_config": object()})


def test_one_of_several_gpus_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(tmp_path, max_steps=1)
    assert args.n_gpu == 0  # sets the devices up
    args._n_gpu = 4
    with caplog.at_level("INFO", logger="fastqadapter"):
        fqa.QAdapterTrainer(model=tiny_base("llama"), args=args, train_dataset=word_rows(2), processing_class=TOKENIZER)
    assert args.n_gpu == 1 and "one of 4 GPUs; `accelerate launch` uses them all" in caplog.text


def test_model_by_folder_with_its_own_tokenizer(tmp_path: Path) -> None:
    trainer = fqa.QAdapterTrainer(
        model=save_base(tmp_path / "base"),
        args=arguments(tmp_path / "out", max_steps=1),
        train_dataset=word_rows(3),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    assert trainer.model.peft_config["default"].r == 2
    assert trainer.model.qadapter_config == fqa.QAdapterConfig()


def test_reference_preset_gets_its_padding_action(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, config=fqa.QAdapterConfig(kv_mode="separate", preset="reference"), max_steps=2)
    assert trainer.data_collator.pad_action == TOKENIZER.pad_token_id
    trainer.train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path,
            config=fqa.QAdapterConfig(kv_mode="shared"),
            max_steps=3,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        )
        trainer.train()
        results.append(adapter_weights(trainer))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-4, atol=1e-6)


def test_disable_dropout(tmp_path: Path) -> None:
    for disable in (True, False):
        trainer = fqa.QAdapterTrainer(
            model=tiny_base("llama"),
            args=arguments(tmp_path, disable_dropout=disable),
            train_dataset=word_rows(2),
            processing_class=TOKENIZER,
            peft_config=LoraConfig(lora_dropout=0.5, target_modules=["q_proj"]),
        )
        rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
        assert rates <= {0.0} if disable else 0.5 in rates


def test_tokenised_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = tokenize_rows(word_rows(4), TOKENIZER, max_length=64)
    assert make_trainer(tmp_path, rows).train_dataset is rows


def test_refusals(tmp_path: Path) -> None:
    base = tiny_base("llama")
    plain = get_peft_model(tiny_base("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model = fqa.get_qadapter_model(base)
    common = {"args": arguments(tmp_path), "train_dataset": word_rows(2), "processing_class": TOKENIZER}
    with pytest.raises(ValueError, match="plain PeftModel"):
        fqa.QAdapterTrainer(model=plain, **common)
    with pytest.raises(ValueError, match="leave out peft_config and qadapter_config"):
        fqa.QAdapterTrainer(model=model, peft_config=LoraConfig(), **common)
    model.save_pretrained(tmp_path / "adapter")
    frozen = fqa.QAdapterModel.from_pretrained(tiny_base("llama"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        fqa.QAdapterTrainer(model=frozen, **common)
    with pytest.raises(ValueError, match=r"max_length=1 is outside its legal range \[2, inf\)"):
        arguments(tmp_path, max_length=1)
    with pytest.raises(ValueError, match="on_bad_row='ignore'"):
        arguments(tmp_path, on_bad_row="ignore")
    with pytest.raises(ValueError, match="remove_unused_columns"):
        arguments(tmp_path, remove_unused_columns=True)
