"""An evaluation as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastqadapter.evaluation.sweep import DIALS

Row = Mapping[str, Any]


def format_report(results: Mapping[str, Any]) -> str:
    """What `eval.json` holds, for reading: a summary of all adapters, then the sweep and answers of each."""
    settings = results["settings"]
    parts = [
        f"# Evaluation of {', '.join(results['adapters'])} on {settings['base']}",
        f"{settings['pairs']} held-out pairs of {settings['dataset']}; accuracy and margin of the implicit reward "
        "`log pi~ - log pi` with 95% bootstrap intervals; KL(base, customised) and perplexity on neutral text, by "
        "token; tasks completed exactly, and of those that the base has right the share *kept*.",
        _table(HEADER, _summary(results)),
    ]
    for name, adapter in results["adapters"].items():
        rows, best = adapter["rows"], adapter["sweet_spot"]
        parts += [f"## {name}", _by_length(rows[0])]
        if best is None:
            parts.append(f"No point of the sweep keeps {settings['keep']:.0%} of what the base has right.")
        else:
            parts.append(f"Sweet spot (highest accuracy that keeps {settings['keep']:.0%}): {_dials(rows[best])}.")
        marks = {0: "adapter's own", best: "**sweet spot**" if best else "adapter's own, **sweet spot**"}
        parts.append(_table(HEADER, [_cells(marks.get(i, ""), row) for i, row in enumerate(rows)]))
        parts.append(_samples(results["base"]["samples"], adapter["samples"]))
    return "\n\n".join(part for part in parts if part) + "\n"


HEADER = ("", "weight, alpha_0, alpha_tilde", "accuracy", "margin, nats", "KL, nats", "perplexity", "tasks", "kept")


def _summary(results: Mapping[str, Any]) -> list[list[str]]:
    first = next(iter(results["adapters"].values()))["rows"][0]
    base = [
        "base",
        "",
        "",
        "",
        "0",
        f"{first['base_perplexity']:.2f}",
        f"{results['base']['capability']['all']:.1%}",
        "",
    ]
    rows = [base]
    for name, adapter in results["adapters"].items():
        rows.append(_cells(name, adapter["rows"][0]))
        if adapter["sweet_spot"]:
            rows.append(_cells(f"{name}, sweet spot", adapter["rows"][adapter["sweet_spot"]]))
    return rows


def _cells(label: str, row: Row) -> list[str]:
    return [
        label,
        _dials(row),
        _mean(row["accuracy"]),
        _mean(row["margin"], 2),
        f"{row['kl']:.4f}",
        f"{row['perplexity']:.2f}",
        f"{row['capability']['all']:.1%}",
        f"{row['kept']:.1%}",
    ]


def _dials(row: Row) -> str:
    return ", ".join(f"{row['point'][name]:g}" for name in DIALS)


def _mean(mean: Mapping[str, float], digits: int = 3) -> str:
    return f"{mean['value']:.{digits}f} [{mean['low']:.{digits}f}, {mean['high']:.{digits}f}]"


def _by_length(row: Row) -> str:
    cells = [f"{name}: {_mean(mean)} ({mean['count']} pairs)" for name, mean in row["by_length"].items()]
    return f"Accuracy by length; {'; '.join(cells)}."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _samples(base: Sequence[Mapping[str, str]], adapter: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """Answers side by side."""
    lines = []
    for number, sample in enumerate(base):
        lines += [f"**{_one_line(sample['prompt'])}**", "", f"- base: {_one_line(sample['answer'])}"]
        lines += [f"- {point}: {_one_line(answers[number]['answer'])}" for point, answers in adapter.items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"...{text[-400:]}"
