"""Plots of training runs (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

PANELS = (
    ("preference loss", "pref_loss", "eval_pref_loss"),
    ("preference accuracy", "rewards/accuracies", "eval_rewards/accuracies"),
    ("reward margin (nats / divisor)", "rewards/margins", "eval_rewards/margins"),
    ("mean squared reward", "chi2_loss", "eval_chi2_loss"),
)


def plot_training(history: Sequence[dict[str, float]], path: Path, title: str = "Q-Adapter training") -> None:
    """Draw loss, accuracy, margin and regulariser over the optimizer steps of `TrainerState.log_history`.

    Training values are the means since the last log line; held-out values are drawn as points.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (label, train_key, eval_key) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for key, name, style in ((train_key, "training", "-"), (eval_key, "held out", "o--")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name, markersize=5)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    figure.axes[1].axhline(0.5, color="grey", linewidth=0.8, linestyle=":")  # chance
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
