"""`fastqadapter train`: a Q-Adapter from preference pairs, with TRL's flag names."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType

from fastqadapter.commands.arguments import ModelArguments, OneLineHfParser, load_model_and_tokenizer, load_rows
from fastqadapter.commands.parsing import ArgumentError
from fastqadapter.config import QAdapterConfig
from fastqadapter.models.sharded import loading_whole
from fastqadapter.monitor import last_checkpoint
from fastqadapter.progress import show_metric_lines
from fastqadapter.trainer import QAdapterTrainer, QAdapterTrainingArguments

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class ScriptArguments:
    """Which preference pairs, with TRL's flag names."""

    dataset_name: str = dataclasses.field(
        metadata={"help": "a .jsonl or .json file of rows prompt/chosen/rejected, or a dataset of the hub"}
    )
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "configuration of a hub dataset"})
    dataset_train_split: str = dataclasses.field(default="train", metadata={"help": "training split (hub datasets)"})
    dataset_test_split: str = dataclasses.field(default="test", metadata={"help": "evaluation split (hub datasets)"})
    eval_dataset_name: str | None = dataclasses.field(
        default=None, metadata={"help": "a file of held-out rows; evaluated at the end, or by --eval_strategy"}
    )


@dataclasses.dataclass
class LoraArguments:
    """The adapter, with TRL's flag names."""

    use_peft: bool = dataclasses.field(default=True, metadata={"help": "accepted for TRL's sake: always true here"})
    lora_r: int = dataclasses.field(default=8, metadata={"help": "rank"})
    lora_alpha: int = dataclasses.field(default=16, metadata={"help": "scale: lora_alpha / lora_r"})
    lora_dropout: float = dataclasses.field(default=0.0, metadata={"help": "needs --disable_dropout false"})
    lora_target_modules: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "names of linear layers; default: all, without k and v in shared mode"}
    )
    use_rslora: bool = dataclasses.field(default=False, metadata={"help": "scale by 1/sqrt(r)"})
    use_dora: bool = dataclasses.field(default=False, metadata={"help": "weight-decomposed LoRA"})


def main(argv: list[str]) -> None:
    parser = OneLineHfParser(
        (ScriptArguments, ModelArguments, QAdapterConfig, LoraArguments, QAdapterTrainingArguments),
        prog="fastqadapter train",
        description="Train a Q-Adapter on preference pairs. --config FILE.yaml holds any of these options.",
    )
    script, model_arguments, config, lora, args = parser.parse(argv)
    _check_lora(lora, args)
    train_rows, eval_rows = _load_rows(script, args)
    with loading_whole():
        model, tokenizer = load_model_and_tokenizer(model_arguments, on_gpu=not _is_sharded(args))
    trainer = QAdapterTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=_lora_config(lora),
        qadapter_config=config,
    )
    show_metric_lines(trainer)
    logger.info(
        "training %s parameters, kv_mode=%s", f"{trainer.model.get_nb_trainable_parameters()[0]:,}", config.kv_mode
    )
    trainer.train(resume_from_checkpoint=_checkpoint(args))
    trainer.save_model()
    trainer.save_state()
    if eval_rows is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    if trainer.is_world_process_zero():
        _plot(trainer.state.log_history, Path(args.output_dir))
        print(f"adapter saved to {args.output_dir}")


def _is_sharded(args: QAdapterTrainingArguments) -> bool:
    """Whether a GPU gets but its part of the base; accelerate's launcher says so by environment variables."""
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed) or any(launched)


def _check_lora(lora: LoraArguments, args: QAdapterTrainingArguments) -> None:
    if not lora.use_peft:
        raise ArgumentError("use_peft=False: a Q-Adapter is an adapter; leave the option out")
    for name in ("lora_r", "lora_alpha"):
        if getattr(lora, name) < 1:
            raise ArgumentError(f"{name}={getattr(lora, name)} is outside its legal range [1, inf)")
    if lora.lora_dropout and args.disable_dropout:
        raise ArgumentError(f"lora_dropout={lora.lora_dropout} acts with --disable_dropout false alone: give both")


def _lora_config(lora: LoraArguments) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def _load_rows(script: ScriptArguments, args: QAdapterTrainingArguments) -> tuple[Any, Any]:
    """Training rows, and held-out rows or None."""
    train_rows = _rows_of("dataset_name", script.dataset_name, script.dataset_train_split, script, args)
    if script.eval_dataset_name is not None:
        name, split = script.eval_dataset_name, script.dataset_test_split
        return train_rows, _rows_of("eval_dataset_name", name, split, script, args)
    if args.eval_strategy == "no":
        return train_rows, None
    if Path(script.dataset_name).is_file():
        raise ArgumentError(f"eval_strategy={args.eval_strategy.value!r} needs held-out rows: give --eval_dataset_name")
    return train_rows, _rows_of("dataset_name", script.dataset_name, script.dataset_test_split, script, args)


def _rows_of(option: str, name: str, split: str, script: ScriptArguments, args: QAdapterTrainingArguments) -> Any:
    return load_rows(option, name, split, config=script.dataset_config, on_bad_row=args.on_bad_row)


def _checkpoint(args: QAdapterTrainingArguments) -> str | bool | None:
    """`--resume_from_checkpoint true` takes the last checkpoint of the output folder."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", ""):
        return None
    if str(wanted).lower() != "true":
        return wanted
    found = last_checkpoint(args.output_dir)
    if found is None:
        logger.info("no checkpoint in %s yet: training from the start", args.output_dir)
    return found


def _plot(history: list[dict[str, float]], folder: Path) -> None:
    """Curves of the run as `curves.png`, where matplotlib is installed."""
    try:
        from fastqadapter.plots import plot_training
    except ImportError:
        logger.info('no plot of the curves: pip install "fastqadapter[demo]" brings matplotlib')
        return
    plot_training(history, folder / "curves.png")
