"""Plots of a run (needs matplotlib): where one would rather look than read a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastqadapter_benchmarks.report import AXES
from fastqadapter_benchmarks.results import Result, fitted_exponent, growth
from fastqadapter_benchmarks.settings import is_ours

OURS, OURS_TOO, OTHER, FLOOR = "tab:green", "#94cf94", "tab:blue", "tab:grey"
MARKERS = "osD^vP*X"
GREENS = matplotlib.color_sequences["tab20"][4:6]  # ours


def draw_all(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write every plot that the results are enough for, as SVG and PNG; returns the SVG files."""
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: half the size, and it can be searched
    matplotlib.rcParams["svg.hashsalt"] = "fastqadapter"  # the same results give the same file
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    plots: dict[str, Callable[[Sequence[Result]], Figure | None]] = {
        "training_step": training_step,
        "loss_by_shape": loss_by_shape,
        "loss_memory": loss_memory,
        "time_per_token": time_per_token,
        "growth": cost_growth,
    }
    for name, plot in plots.items():
        figure = plot(results)
        if figure is not None:
            for ending, metadata in (("svg", {"Date": None}), ("png", {})):
                figure.savefig(folder / f"{name}.{ending}", dpi=120, metadata=metadata)
            drawn.append(folder / f"{name}.svg")
    return drawn


def _of(results: Sequence[Result], suite: str) -> list[Result]:
    return [result for result in results if result.suite == suite]


def _colour(result: Result, label: str) -> str:
    if label in (result.floor, result.baseline):
        return FLOOR
    if label == result.ours:
        return OURS
    return OURS_TOO if is_ours(label) else OTHER


def training_step(results: Sequence[Result]) -> Figure | None:
    """Seconds and peak memory of a step, one bar a method."""
    steps = _of(results, "step")
    if not steps:
        return None
    result = steps[0]
    figure = Figure(figsize=(9, 0.4 * len(result.labels) + 1.4), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    labels = result.labels[::-1]
    colours = [_colour(result, label) for label in labels]
    _bars(time, labels, [result.median(label) for label in labels], colours, "%.2f")
    time.set_xlabel("seconds")
    _bars(memory, labels, [result.extra_mib.get(label, math.nan) for label in labels], colours, "%.0f")
    memory.set_xlabel("peak memory beyond the model, MiB")
    figure.suptitle(f"Training step: {result.title}", fontsize=10)
    return figure


def _bars(axes: Axes, labels: list[str], values: list[float], colours: list[str], text: str) -> None:
    bars = axes.barh(labels, values, color=colours)
    axes.bar_label(bars, fmt=text, padding=2, fontsize=8)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def loss_by_shape(results: Sequence[Result]) -> Figure | None:
    """Time of every method over ours, a marker for each shape."""
    cases = _of(results, "loss")
    if not cases:
        return None
    ratios = [{_plain(result, label): result.ratio(label, result.ours) for label in result.labels} for result in cases]
    every = {label for points in ratios for label in points}
    labels = sorted(every, key=lambda label: max(points.get(label, 0.0) for points in ratios), reverse=True)
    figure = Figure(figsize=(9, 0.32 * len(labels) + 2), layout="constrained")
    axes = figure.subplots()
    for marker, result, points in zip(MARKERS * len(cases), cases, ratios, strict=False):
        places = [labels.index(label) for label in points]
        axes.plot([*points.values()], places, marker, label=result.title, alpha=0.8, markersize=6)
    axes.axvline(1.0, color=OURS, linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    axes.set_xlabel("time, as a multiple of fastqadapter's (log scale)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=1)
    figure.suptitle("Loss and gradient of preference pairs", fontsize=10)
    return figure


def _plain(result: Result, label: str) -> str:
    return "fastqadapter" if label == result.ours else label


def loss_memory(results: Sequence[Result]) -> Figure | None:
    """Peak memory by N V; every competitor that ran at more than one size has a line."""
    points: dict[str, dict[float, float]] = {}
    for result in results:
        if {"N", "V"} <= result.shape.keys() and result.axis in (None, "N", "V") and not result.variant:
            size = result.shape["N"] * result.shape["V"]
            for label, peak in result.extra_mib.items():
                # Less than a page or two is nothing; a logarithm wants a number.
                points.setdefault(label, {})[size] = max(points.get(label, {}).get(size, 0.0), peak, 0.1)
    if not points:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    others = iter([colour for colour in matplotlib.color_sequences["tab20"] if colour not in GREENS])
    for marker, (label, found) in zip(MARKERS * len(points), sorted(points.items()), strict=False):
        ours = any(label == result.ours for result in results)
        line = "-" if len(found) > 1 else ""
        colour = OURS if ours else OURS_TOO if is_ours(label) else next(others)
        axes.plot(
            *zip(*sorted(found.items()), strict=True),
            marker + line,
            color=colour,
            label=label,
            linewidth=2.5 if ours else 1,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("N V, state rows times vocabulary")
    axes.set_ylabel("peak memory beyond the inputs, MiB")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.suptitle("Memory of the loss and its gradient", fontsize=10)
    return figure


def time_per_token(results: Sequence[Result]) -> Figure | None:
    """One panel for each batch size and prompt, one bar a method."""
    cases = _of(results, "decode")
    if not cases:
        return None
    figure = Figure(figsize=(4.2 * len(cases) + 1.5, 3.2), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    labels = cases[0].labels[::-1]
    for axes, result in zip(panels, cases, strict=True):
        values = [1e3 * result.median(label) if label in result.labels else math.nan for label in labels]
        _bars(axes, labels, values, [_colour(result, label) for label in labels], "%.0f")
        axes.set_xlabel("ms per token")
        axes.set_title(result.title, fontsize=8)
    return figure


def cost_growth(results: Sequence[Result]) -> Figure | None:
    """A panel for each sweep, with fitted exponents."""
    sweeps = growth(results)
    if not sweeps:
        return None
    columns = min(3, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    floors = {label for result in results for label in (result.floor, result.baseline)}
    for (axis, lines), axes in zip(sweeps.items(), panels, strict=False):  # panels last, or one is lost
        for marker, (label, points) in zip(MARKERS, lines.items(), strict=False):
            exponent = fitted_exponent(points)
            sizes, times = zip(*sorted(points.items()), strict=True)
            colour = OURS if is_ours(label) else FLOOR if label in floors else OTHER
            axes.plot(sizes, times, marker + "-", color=colour, label=f"{label}: {exponent:.2f}", markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(AXES[axis], fontsize=8)
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, title="fitted exponent", title_fontsize=7)
    for axes in panels:
        axes.set_visible(False)
    return figure
