"""The frontier of an evaluation: what is learned against what is lost (needs matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastqadapter.evaluation.scores import Point
from fastqadapter.evaluation.sweep import DIALS, swept

COLOURS = dict(zip(DIALS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
PANELS = (
    ("KL(base, customised) on neutral text, nats per token", "kl"),
    ("share of the base's right tasks kept", "kept"),
)
FORMATS = ("png", "svg")


def plot_frontier(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """`frontier.png` and `.svg`: preference accuracy against KL and against capability, a row of panels for each
    adapter, a line for each dial that was swept, the sweet spot marked."""
    adapters = results["adapters"]
    figure = Figure(figsize=(11, 4.2 * len(adapters)), layout="constrained")
    panels = figure.subplots(len(adapters), len(PANELS), squeeze=False)
    for axes_of_adapter, (name, adapter) in zip(panels, adapters.items(), strict=True):
        for axes, (label, key) in zip(axes_of_adapter, PANELS, strict=True):
            _panel(axes, adapter["rows"], adapter["sweet_spot"], key)
            axes.set(xlabel=label, ylabel="preference accuracy", title=name)
        axes_of_adapter[0].set_xscale("symlog", linthresh=1e-3)
        axes_of_adapter[1].axvline(results["settings"]["keep"], color="grey", linewidth=0.8, linestyle=":")
        axes_of_adapter[0].legend(fontsize=8)
    figure.suptitle(f"{results['settings']['base']}, {results['settings']['pairs']} held-out pairs")
    paths = [folder / f"frontier.{suffix}" for suffix in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=120)
    return paths


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], best: int | None, key: str) -> None:
    home = Point(**rows[0]["point"])
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")  # chance
    for dial in DIALS:
        own = [row for row in rows if swept(home, Point(**row["point"])) == dial]
        if not own:
            continue
        own = sorted([*own, rows[0]], key=lambda row: row["point"][dial])
        axes.plot(*_xy(own, key), "o-", color=COLOURS[dial], label=f"{dial} varies", markersize=4, linewidth=1)
        for row in (own[0], own[-1]):
            axes.annotate(f"{row['point'][dial]:g}", (row[key], row["accuracy"]["value"]), fontsize=7,
                          color=COLOURS[dial], xytext=(3, 3), textcoords="offset points")  # fmt: skip
    several = [row for row in rows if row is not rows[0] and swept(home, Point(**row["point"])) is None]
    if several:
        axes.plot(*_xy(several, key), ".", color="lightgrey", label="several vary", zorder=0)
    low, high = (rows[0]["accuracy"][end] for end in ("low", "high"))
    value = rows[0]["accuracy"]["value"]
    axes.errorbar([rows[0][key]], [value], [[value - low], [high - value]], fmt="s", color="black", capsize=3,
                  markersize=5, label="adapter's own dials, 95% interval")  # fmt: skip
    if best is not None:
        axes.plot(*_xy([rows[best]], key), "*", color="crimson", markersize=14, label="sweet spot")
    axes.grid(alpha=0.3)


def _xy(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [max(row[key], 0.0) for row in rows], [row["accuracy"]["value"] for row in rows]
