"""Results as Markdown: the tables of a run, and `RESULTS.md`, in which every machine has a section of its own."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastqadapter_benchmarks.results import Result, fitted_exponent, growth, memory_growth

SUITES = {
    "step": "Training step, forward and backward",
    "loss": "Loss of pairs from hidden states, with its gradient",
    "decode": "Generation",
    "adapters": "Generation: several adapters in one call",
    "compiled": "Generation: compiled, static cache",
    "ops": "Single operators",
    "files": "Collating, saving, loading",
}
AXES = {
    "N": "loss and gradient, N state rows",
    "D": "loss and gradient, D of the head",
    "V": "loss and gradient, V tokens of the vocabulary",
    "context": "training step, tokens of each branch, 2 pairs",
    "pairs": "training step, pairs of a micro-batch",
    "decoded context": "time per token behind a prompt of so many tokens",
}
HEADER = """# Benchmark results

Written by `fastqadapter bench --results`; nothing here is edited by hand. A section is one run on one machine. Times
are medians over rounds in which every competitor ran once, one after the other; ratios are medians over rounds of two
times of one round. "Extra MiB" is peak memory beyond the inputs. The code of every competitor:
`benchmarks/fastqadapter_benchmarks`.
"""
PREDICTED = ("H100", "H200")


def seconds(value: float) -> str:
    """With three digits, in a unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            number = value / scale
            return f"{number:.3g} {unit}" if number < 99.95 else f"{number:.0f} {unit}"
    return f"{value * 1e6:.3g} us"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def case_table(result: Result) -> str:
    """All that was measured of one case, fastest first; ours in bold."""
    columns = ["method", "median", "quartiles", "times ours"]
    if result.reference:
        columns.append("times base" if result.baseline else "times floor")
    columns += ["backward"] if result.backward_seconds else []
    decodes = result.metric == "per_token"
    if decodes:
        columns += ["tokens/s", "first token", *(["times base's"] if result.reference else []), "K/V MiB"]
    columns += ["extra MiB"] if result.extra_mib else []
    columns += ["off by"] if result.errors else []
    columns += ["note"] if result.notes else []

    def row(label: str) -> list[str]:
        backward = result.backward_seconds.get(label)
        low, high = result.quartiles(label)
        median = result.median(label)
        cells = {
            "method": f"**{label}**" if label == result.ours else label,
            "median": seconds(median),
            "quartiles": f"{seconds(low)} to {seconds(high)}",
            "times ours": f"{result.ratio(label, result.ours):.2f}",
            "backward": seconds(statistics.median(backward)) if backward else "",
            "note": result.notes.get(label, ""),
            "extra MiB": f"{result.extra_mib[label]:.0f}" if label in result.extra_mib else "",
            "off by": f"{result.errors[label]:.1e}" if label in result.errors else "",
        }
        if result.reference:
            against = f"{result.ratio(label, result.reference):.2f}"
            cells |= {"times base": against, "times floor": against}
            if decodes:
                cells["times base's"] = f"{result.ratio(label, result.reference, 'first_token'):.2f}"
        if decodes:
            cells |= {
                "tokens/s": f"{result.shape.get('batch', 1) / median:.0f}",
                "first token": seconds(result.median(label, "first_token")),
                "K/V MiB": f"{result.kv_bytes[label] / 2**20:.2f}" if label in result.kv_bytes else "",
            }
        return [cells[column] for column in columns]

    return table(columns, [row(label) for label in result.labels])


def absent_lines(result: Result) -> list[str]:
    lines = [f"* Not measured here: {label}: {reason}." for label, reason in result.absent.items()]
    return lines + [f"* Memory of {label}: {reason}." for label, reason in result.memory_unknown.items()]


def growth_tables(results: Sequence[Result]) -> str:
    """Each sweep: median time at every size, exponent of the fitted power, and peak memory where it was measured."""
    memory = memory_growth(results)
    parts = []
    for axis, lines in growth(results).items():
        sizes = sorted({size for points in lines.values() for size in points})
        header = ["method", *(f"{size:g}" for size in sizes)]
        rows = []
        for label, points in lines.items():
            exponent = fitted_exponent(points)
            cells = [seconds(points[size]) if size in points else "" for size in sizes]
            rows.append([label, *cells, "" if math.isnan(exponent) else f"{exponent:.2f}"])
        parts.append(f"{AXES[axis]}:\n\n{table([*header, 'exponent'], rows)}")
        if axis in memory:
            rows = [
                [label, *(f"{points[size]:.0f}" if size in points else "" for size in sizes)]
                for label, points in memory[axis].items()
            ]
            parts.append(f"The same, extra MiB:\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def tables(results: Sequence[Result], level: int = 3) -> str:
    """All suites, each under a heading."""
    marks = "#" * level
    parts = []
    for suite, heading in SUITES.items():
        chosen = [result for result in results if result.suite == suite]
        if chosen:
            parts.append(f"{marks} {heading}")
        for result in chosen:
            parts.append(f"{result.title}:")
            parts.append(case_table(result))
            parts += ["\n".join(absent_lines(result))] if absent_lines(result) else []
    sweeps = growth_tables(results)
    if sweeps:
        parts += [f"{marks} How cost grows", sweeps]
    return "\n\n".join(parts)


def summary(results: Sequence[Result]) -> str:
    """One table of the three things that cost: first case of the step, the loss, and decoding. Empty without them."""
    rows = []
    for suite in ("step", "loss", "decode"):
        result = next((each for each in results if each.suite == suite), None)
        if result is None:
            continue
        rows.append([f"**{SUITES[suite]}** ({result.title})", "", "", ""])
        for label in result.labels:
            note = f" ({result.notes[label]})" if label in result.notes else ""
            extra = f"{result.extra_mib[label]:.0f} MiB" if label in result.extra_mib else ""
            kept = f"K/V {result.kv_bytes[label] / 2**20:.2f} MiB" if label in result.kv_bytes else ""
            name = f"**{label}**" if label == result.ours else label
            times = f"{result.ratio(label, result.ours):.2f}"
            rows.append([name + note, seconds(result.median(label)), times, extra or kept])
        rows += [[label, "not measured", "", reason] for label, reason in result.absent.items()]
    return table(["", "median", "times ours", "extra memory"], rows) if rows else ""


def machine_lines(machine: Mapping[str, object]) -> str:
    versions = machine["versions"]
    assert isinstance(versions, Mapping)
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    threads = f"{machine['threads']} threads of {machine['cores']} cores"
    commit = f"commit {machine['commit']}" if machine["commit"] else "an installed package"
    return f"{machine['device']}, {threads}; kernels: {machine['kernels']}; {listed}; {commit}."


def measured_section(results: Sequence[Result], command: str, plots: Sequence[str]) -> str:
    """The section of one run in RESULTS.md."""
    machine = results[0].machine
    pictures = "\n\n".join(f"![{Path(plot).stem}]({plot})" for plot in plots)
    kind = "GPU" if machine["gpu"] else "CPU"
    parts = [f"## Measured on a {kind}: {machine['device']}", machine_lines(machine), f"```bash\n{command}\n```"]
    return "\n\n".join(part for part in (*parts, pictures, tables(results)) if part)


def predicted_section() -> str:
    """What the paper model says of GPUs: not measured. It asks the Triton kernels for their tiles.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    from fastqadapter_benchmarks import roofline

    rows = []
    for gpu in PREDICTED:
        for model, (size, vocab) in roofline.MODELS.items():
            cells = [gpu, f"{model} (D {size}, V {vocab})"]
            for op in ("soft_value, training", "soft_value, evaluation"):
                costs = roofline.OPS[op](roofline.GPUS[gpu], 4096, size, vocab)
                floor, ours = (cost.seconds(roofline.GPUS[gpu]) for cost in costs)
                cells += [seconds(floor), seconds(ours), f"{ours / floor:.2f}"]
            rows.append(cells)
    header = ["GPU", "head", "training: floor", "ours", "ratio", "evaluation: floor", "ours", "ratio"]
    text = (
        "Nothing in this section was measured. It is what a model of bytes and floating-point operations says of the "
        "Triton kernels, with 4096 state rows in bf16 (`python -m fastqadapter_benchmarks.roofline` has all of it and "
        "its assumptions). `fastqadapter bench --full --results RESULTS.md` on a GPU adds a section of measurements."
    )
    return f"## GPUs: predictions\n\n{text}\n\n{table(header, rows)}"


def update_results_file(path: Path, sections: Mapping[str, str]) -> None:
    """Write sections by name into the file; those of other names that it has stay as they are."""
    kept = dict(_sections(path.read_text(encoding="utf-8"))) if path.exists() else {}
    marked = [f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->" for name, text in {**kept, **sections}.items()]
    path.write_text("\n\n".join([HEADER.rstrip(), *marked]) + "\n", encoding="utf-8")


def _sections(text: str) -> list[tuple[str, str]]:
    return re.findall(r"<!-- begin (.+?) -->\n(.*?)\n<!-- end \1 -->", text, flags=re.DOTALL)
