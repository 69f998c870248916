"""What is learned against what is forgotten, a point for each run (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import Run
from records import Outcome
from tables import OURS, is_searched, label_of, weights_of

# Colour and marker by method, and by KV mode for ours.
STYLES = {
    "DPO": ("tab:blue", "s"),
    "SFT": ("tab:purple", "P"),
    "Q-Adapter, published objective": ("tab:red", "X"),
    "Q-Adapter, logits": ("tab:orange", "X"),
    "Q-Adapter, separate": ("#94cf94", "o"),
    "Q-Adapter, prompt": ("#4faf4f", "^"),
    "Q-Adapter, shared": ("tab:green", "D"),
}


def draw(name: str, outcomes: Sequence[tuple[Run, Outcome]], folder: Path) -> None:
    """`NAME.svg`: accuracy and margin against KL; lines are one adapter at several weights."""
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: half the size, and it can be searched
    matplotlib.rcParams["svg.hashsalt"] = "fastqadapter"  # the same results give the same file
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    accuracy, margin = figure.subplots(1, 2)
    compared = [(run, found) for run, found in outcomes if not is_searched(run)]
    for axes, figure_of in ((accuracy, "accuracy"), (margin, "margin")):
        _points(axes, compared, figure_of)
        axes.set_xscale("symlog", linthresh=1e-3)  # a KL may be 0
        axes.set(xlabel="KL(base, customised) on neutral text, nats per token")
    accuracy.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    accuracy.set(ylabel="preference accuracy, held out")
    margin.set_yscale("symlog", linthresh=0.1)  # and a margin negative
    margin.set(ylabel="margin, nats")
    margin.legend(fontsize=8)
    figure.suptitle(name)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _points(axes: Axes, outcomes: Sequence[tuple[Run, Outcome]], figure_of: str) -> None:
    labelled = set()
    for run, found in outcomes:
        label = label_of(run)
        if run.method == OURS:
            label += ", logits" if run.q_head == "logits" else f", {run.kv_mode}"
        colour, marker = STYLES[label]
        weights = weights_of(found)
        points = [(row["kl"], row[figure_of]["value"]) for row in weights]
        axes.plot(*zip(*points, strict=True), "-", color=colour, linewidth=0.8, markersize=3, marker=marker)
        home = found["rows"][0]
        name = None if label in labelled else label
        axes.plot(home["kl"], home[figure_of]["value"], marker, color=colour, label=name, linestyle="", markersize=7)
        if len(weights) > 1:
            for row in (weights[0], weights[-1]):
                axes.annotate(f"{row['point']['weight']:g}", (row["kl"], row[figure_of]["value"]), fontsize=7,
                              color=colour, xytext=(3, 3), textcoords="offset points")  # fmt: skip
        labelled.add(label)
