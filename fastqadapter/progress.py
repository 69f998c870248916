"""Progress of a training run on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

# Metric -> its name in a line; the rest is in the log history and in what `report_to` names.
SHOWN = {
    "loss": "loss",
    "pref_loss": "pref_loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "learning_rate": "lr",
}


class MetricLines(ProgressCallback):
    """transformers' progress bars, with one short line a log on stderr instead of a dictionary of all metrics."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        line = metric_line(logs or {})
        if state.is_world_process_zero and line:
            place = f"step {state.global_step}/{state.max_steps}" if state.max_steps else "before training"
            tqdm.write(f"{place}  {line}", file=sys.stderr)


def metric_line(logs: Mapping[str, float]) -> str:
    """`loss 0.4542  accuracy 1  margin 0.6397`, after "held out" for metrics of an evaluation; "" without any."""
    prefix = "eval_" if "eval_loss" in logs else ""
    parts = [f"{name} {logs[prefix + key]:.4g}" for key, name in SHOWN.items() if prefix + key in logs]
    return ("held out: " if prefix and parts else "") + "  ".join(parts)


def show_metric_lines(trainer: Trainer) -> None:
    """Let `trainer` print metric lines, where it shows progress bars at all (`disable_tqdm`)."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(MetricLines)
