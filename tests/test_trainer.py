"""QAdapterTrainer: exact accumulation, metrics, evaluation, what its constructor takes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

import fastqadapter as fqa
from fastqadapter.data import tokenize_rows
from tiny import lora_parameters, tiny_base
from trainers import TOKENIZER, adapter_weights, arguments, make_trainer
from words import save_base, word_rows, word_tokenizer


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


def test_a_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    class Halved(fqa.QAdapterTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(inputs).loss / 2

    args = {"args": arguments(tmp_path, max_steps=2), "train_dataset": word_rows(4), "processing_class": TOKENIZER}
    trainer = Halved(tiny_base("llama"), **args)
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_empty_evaluation_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^eval_dataset: no row left"):
        make_trainer(tmp_path, eval_dataset=[])


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
