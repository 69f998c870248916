"""The demo: train a Q-Adapter for concise answers on a small real model, and measure before and after."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from fastqadapter.config import KVMode, QAdapterConfig
from fastqadapter.demo import measure
from fastqadapter.demo.preference import conciseness, neutral_prompts, preference_pairs, sample_questions
from fastqadapter.models import QAdapterModel, get_qadapter_model
from fastqadapter.monitor import last_checkpoint
from fastqadapter.plots import plot_training
from fastqadapter.progress import show_metric_lines
from fastqadapter.trainer import QAdapterTrainer, QAdapterTrainingArguments

logger = logging.getLogger(__name__)

STRENGTHS = (0.5, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much the demo does."""

    train_pairs: int | None
    heldout_pairs: int | None
    questions: int | None
    epochs: float
    answer_tokens: int


FULL = Size(train_pairs=None, heldout_pairs=None, questions=None, epochs=1.0, answer_tokens=80)
SMOKE = Size(train_pairs=160, heldout_pairs=32, questions=3, epochs=1.0, answer_tokens=60)


def run_demo(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, kv_mode: KVMode, seed: int, size: Size
) -> dict[str, Any]:
    """Train, measure, save; returns the report that is also written to `folder/report.json` and `report.md`.

    A run that was killed goes on from its last checkpoint; a finished one is done again.
    """
    started = time.perf_counter()
    checkpoints = folder / "checkpoints"
    if (folder / "report.json").exists():
        shutil.rmtree(checkpoints, ignore_errors=True)
        (folder / "report.json").unlink()
    folder.mkdir(parents=True, exist_ok=True)

    train_rows, heldout_rows = preference_pairs(seed=0)
    config = QAdapterConfig(kv_mode=kv_mode)
    set_seed(seed)
    adapted = get_qadapter_model(model, config)
    trainer = QAdapterTrainer(
        model=adapted,
        args=_training_arguments(checkpoints, seed, size),
        train_dataset=train_rows[: size.train_pairs],
        eval_dataset=heldout_rows[: size.heldout_pairs],
        processing_class=tokenizer,
    )
    show_metric_lines(trainer)
    neutral = neutral_prompts()[: size.questions]
    base_answers = measure.answers(
        adapted, tokenizer, neutral, 0.0, max_new_tokens=size.answer_tokens // 2, description="base policy"
    )
    neutral_batch = measure.pack_answers(tokenizer, neutral, base_answers)

    before = _heldout(trainer) | {"kl_from_base": measure.kl_from_base(adapted, neutral_batch)}
    trainer.train(resume_from_checkpoint=last_checkpoint(str(checkpoints)))
    after = _heldout(trainer) | {"kl_from_base": measure.kl_from_base(adapted, neutral_batch)}

    adapted.eval()
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    plot_training(trainer.state.log_history, folder / "curves.png", title="Q-Adapter demo: concise answers")
    report = {
        "model": str(model.config.name_or_path),
        "kv_mode": kv_mode,
        "train_pairs": len(trainer.train_dataset),
        "heldout_pairs": len(trainer.eval_dataset),
        "optimizer_steps": trainer.state.global_step,
        "before": before,
        "after": after,
        "answers": _answers_by_strength(adapted, tokenizer, size),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mib": round(_peak_memory_mib()),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(format_report(report, folder), encoding="utf-8")
    return report


def _training_arguments(checkpoints: Path, seed: int, size: Size) -> QAdapterTrainingArguments:
    return QAdapterTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=size.epochs,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        learning_rate=1e-3,
        warmup_steps=5,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="steps",
        save_steps=20,
        save_total_limit=1,
        report_to="none",
        seed=seed,
    )


def _heldout(trainer: QAdapterTrainer) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {
        "accuracy": metrics["eval_rewards/accuracies"],
        "margin": metrics["eval_rewards/margins"],
        "pref_loss": metrics["eval_pref_loss"],
    }


def _answers_by_strength(model: QAdapterModel, tokenizer: PreTrainedTokenizerBase, size: Size) -> list[dict[str, Any]]:
    """Answers to the sample questions by the base and at each strength, each scored by the program."""
    questions = sample_questions()[: size.questions]
    result = []
    for strength in (0.0, *STRENGTHS):
        ids = measure.answers(
            model,
            tokenizer,
            questions,
            strength,
            max_new_tokens=size.answer_tokens,
            description=f"answers at strength {strength:g}",
        )
        texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids]
        scores = [conciseness(text) for text in texts]
        result.append(
            {
                "strength": strength,
                "mean_words": sum(score["words"] for score in scores) / len(scores),
                "concise": sum(score["concise"] for score in scores) / len(scores),
                "samples": [{"question": q, "answer": text} for q, text in zip(questions, texts, strict=True)],
            }
        )
    return result


def _peak_memory_mib() -> float:
    """Peak memory of the accelerator where one is used, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def format_report(report: dict[str, Any], folder: Path) -> str:
    """The report as Markdown, which also reads well on a terminal."""
    before, after = report["before"], report["after"]
    lines = [
        f"# Q-Adapter demo: concise answers (kv_mode={report['kv_mode']})",
        "",
        f"{report['train_pairs']} training pairs, {report['optimizer_steps']} optimizer steps, "
        f"{report['heldout_pairs']} held-out pairs; {report['seconds']:.0f} s in all, "
        f"peak memory {report['peak_memory_mib']} MiB.",
        "",
        "| held out | before | after |",
        "| --- | --- | --- |",
        *(
            f"| {label} | {before[key]:.3f} | {after[key]:.3f} |"
            for label, key in (
                ("preference accuracy", "accuracy"),
                ("reward margin", "margin"),
                ("preference loss", "pref_loss"),
                ("KL(base, customised) on neutral prompts, nats/token", "kl_from_base"),
            )
        ),
        "",
        "| adapter strength | words per answer | concise by the program |",
        "| --- | --- | --- |",
        *(
            f"| {_strength(entry['strength'])} | {entry['mean_words']:.1f} | {entry['concise']:.0%} |"
            for entry in report["answers"]
        ),
        "",
    ]
    for index, sample in enumerate(report["answers"][0]["samples"][:4]):
        lines.append(f"**{sample['question']}**")
        for entry in report["answers"]:
            answer = " ".join(entry["samples"][index]["answer"].split())
            lines.append(f"- {_strength(entry['strength'])}: {answer}")
        lines.append("")
    lines.append(f"Adapter: {folder / 'adapter'}    Curves: {folder / 'curves.png'}")
    return "\n".join(lines) + "\n"


def _strength(strength: float) -> str:
    return "0 (base)" if strength == 0 else f"{strength:g}"
