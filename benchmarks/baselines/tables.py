"""The outcomes of all runs on one data set as Markdown."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from methods import Run

from fastqadapter_benchmarks.report import table

Outcome = dict[str, Any]  # what training and evaluation left: seconds, peak_mib, device, evaluation, base
Row = Mapping[str, Any]  # of an evaluation: accuracy, kl, perplexity, kept at one setting of the dials
OURS = "q-adapter"

HEAD = """# Does it learn, does it forget

Written by `benchmarks/baselines/quality.py --results`; nothing here is edited by hand. All methods train LoRA of one
rank on the same layers (q, o, MLP), on the same 480 pairs of at most 256 tokens, for as many steps of 8 pairs; ours
by `QAdapterTrainer`, SFT on the chosen response and DPO by TRL's trainers, from SmolLM2-135M-Instruct in bf16.
`fastqadapter eval` measures all of them in one way (docs/evaluation.md): *accuracy* is the share of held-out pairs
whose chosen response has the higher implicit reward, log pi~ - log pi summed over the response, with a 95 % bootstrap
interval over the pairs; *KL* is KL(base || customised) per token of neutral text; *kept* the share of the tasks that
the base does right. Seconds and MiB are of training. Two CPU threads had the machine to themselves; one thread shared
it with other work, and on the GPU a dozen runs ran at once, so that those seconds say little. A row of several seeds
has their means."""

COLUMNS = (
    *("method", "KV mode", "Q head", "seeds", "accuracy", "by seed", "margin", "KL, nats", "perplexity", "kept"),
    *("seconds", "MiB", "on"),
)


def section(name: str, outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    """Methods, then the frontier of the swept run, then what one can say of it against DPO."""
    compared = [(run, found) for run, found in outcomes if not is_searched(run)]
    searched = [(run, found) for run, found in outcomes if is_searched(run)]
    parts = [f"## {name}", methods_table(compared)]
    swept = [found for run, found in compared if run.method == OURS and len(rows_of(found)) > 1]
    parts += [f"The first run of ours at other dials, without training again:\n\n{frontier(found)}" for found in swept]
    parts += [against_dpo(compared)] if swept and any(run.method == "dpo" for run, _ in compared) else []
    if searched:
        parts.append(f"Ours with one setting changed, `shared`:\n\n{search_table(searched)}")
    return "\n\n".join(parts)


def is_searched(run: Run) -> bool:
    """Whether a run of ours differs from the compared ones in more than mode, head and seed."""
    compared = Run(OURS, run.model, run.train_pairs, kv_mode=run.kv_mode, q_head=run.q_head, seed=run.seed)
    return run.method == OURS and run != compared


def rows_of(found: Outcome) -> list[Row]:
    return list(found["evaluation"]["rows"])


def by_setting(outcomes: Sequence[tuple[Run, Outcome]]) -> dict[Run, list[Outcome]]:
    """The outcomes of all seeds of a run."""
    groups: dict[Run, list[Outcome]] = {}
    for run, found in outcomes:
        groups.setdefault(dataclasses.replace(run, seed=0), []).append(found)
    return groups


def methods_table(outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    groups = by_setting(outcomes)
    return table(COLUMNS, [[*_names(run), *_measured(own), *_cost(own)] for run, own in groups.items()])


def search_table(outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    def changed(run: Run) -> str:
        default = Run(OURS, run.model, run.train_pairs)
        names = (field.name for field in dataclasses.fields(Run))
        return ", ".join(
            f"{name} {getattr(run, name)}" for name in names if getattr(run, name) != getattr(default, name)
        )

    columns = ("changed", *COLUMNS[3:])
    rows = [[changed(run), *_measured(own), *_cost(own)] for run, own in by_setting(outcomes).items()]
    return table(columns, rows)


def _names(run: Run) -> list[str]:
    label = {OURS: "Q-Adapter", "published": "Q-Adapter, published objective", "dpo": "DPO", "sft": "SFT"}
    beta = "" if run.beta is None else f", beta {run.beta:g}"
    mode = {"published": "separate", OURS: run.kv_mode}.get(run.method, "own")
    head = {"published": "logits", OURS: run.q_head}.get(run.method, "")
    return [f"{label[run.method]} (lr {run.learning_rate:g}{beta})", mode, head]


def _measured(own: Sequence[Outcome]) -> list[str]:
    rows = [rows_of(each)[0] for each in own]
    accuracies = [row["accuracy"] for row in rows]
    mean = statistics.mean
    low, high = (mean(each[end] for each in accuracies) for end in ("low", "high"))
    return [
        str(len(own)),
        f"{mean(each['value'] for each in accuracies):.3f} [{low:.3f}, {high:.3f}]",
        ", ".join(f"{each['value']:.3f}" for each in accuracies) if len(own) > 1 else "",
        f"{mean(row['margin']['value'] for row in rows):.2f}",
        f"{mean(row['kl'] for row in rows):.4f}",
        f"{mean(row['perplexity'] for row in rows):.2f}",
        f"{100 * mean(row['kept'] for row in rows):.1f}%",
    ]


def _cost(own: Sequence[Outcome]) -> list[str]:
    seconds, peak = (statistics.mean(each[name] for each in own) for name in ("seconds", "peak_mib"))
    return [f"{seconds:.0f}", f"{peak:.0f}", ", ".join(dict.fromkeys(each["device"] for each in own))]


DIALS = ("weight", "alpha_0", "alpha_tilde")


def frontier(found: Outcome) -> str:
    """Every swept setting of the dials."""
    columns = (*DIALS, "accuracy", "margin", "KL, nats", "perplexity", "kept")
    return table(columns, [[*(f"{row['point'][dial]:g}" for dial in DIALS), *_point(row)] for row in rows_of(found)])


def _point(row: Row) -> list[str]:
    accuracy = row["accuracy"]
    return [
        f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]",
        f"{row['margin']['value']:.2f}",
        f"{row['kl']:.4f}",
        f"{row['perplexity']:.2f}",
        f"{100 * row['kept']:.1f}%",
    ]


def against_dpo(outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    """Whether ours reaches the accuracy of the best DPO run at half its KL, at some setting of the dials."""
    baselines = (rows_of(found)[0] for run, found in outcomes if run.method == "dpo")
    best = max(baselines, key=lambda row: (_accuracy(row), -row["kl"]))
    enough = [
        row for row in _points_of_ours(outcomes) if _accuracy(row) >= _accuracy(best) and 2 * row["kl"] <= best["kl"]
    ]
    bar = f"The best DPO run has accuracy {_accuracy(best):.3f} at KL {best['kl']:.4f}. "
    if not enough:
        return bar + "No setting of ours reaches that at half the KL."
    ours = max(enough, key=_accuracy)
    dials = ", ".join(f"{dial} {ours['point'][dial]:g}" for dial in DIALS)
    found = f"{bar}Ours at {dials} has {_accuracy(ours):.3f} at {ours['kl']:.4f}."
    return f"{found} (Both are the best of several settings on these very pairs, and their intervals overlap.)"


def _points_of_ours(outcomes: Sequence[tuple[Run, Outcome]]) -> Iterator[Row]:
    for run, found in outcomes:
        if run.method == OURS:
            yield from rows_of(found)


def _accuracy(row: Row) -> float:
    return float(row["accuracy"]["value"])
