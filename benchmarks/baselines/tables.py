"""The outcomes of all runs on one data set as Markdown."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from methods import Run
from records import Outcome, Row

from fastqadapter.evaluation.sweep import DIALS
from fastqadapter_benchmarks.report import table

OURS = "q-adapter"

HEAD = """# Does it learn, does it forget

Written by `benchmarks/baselines/quality.py --results` from the figures in `benchmarks/baselines/outcomes`; nothing here
is edited by hand. All methods train LoRA of one rank on the same layers (q, o, MLP), on the same pairs, for as many
steps of 8 pairs, in bf16; ours by `QAdapterTrainer`, SFT on the chosen response and DPO by TRL's trainers.
`fastqadapter eval` measures all of them in one way (docs/evaluation.md): *accuracy* is the share of held-out pairs
whose chosen response has the higher implicit reward, log pi~ - log pi summed over the response, with a 95 % bootstrap
interval over the pairs; *KL* is KL(base || customised) per token of neutral text; *kept* the share of the tasks that
the base does right. A row of several seeds has their means. Seconds and MiB are of training. Two runs of one
thread each shared two cores, and a dozen shared the GPU: seconds compare runs on one kind of device, roughly."""

COLUMNS = (
    *("method", "KV mode", "Q head", "seeds", "accuracy", "by seed", "margin", "KL, nats", "perplexity", "kept"),
    *("seconds", "MiB", "on"),
)


def section(name: str, outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    """Methods, then the frontier of the swept run, then what one can say of it against DPO."""
    compared = [(run, found) for method in LABELS for run, found in outcomes if run.method == method]
    compared = [(run, found) for run, found in compared if not is_searched(run)]
    searched = [(run, found) for run, found in outcomes if is_searched(run)]
    parts = [f"## {name}", _on_what(outcomes), f"![{name}](plots/quality/{name}.svg)", methods_table(compared)]
    ours = [(run, found) for run, found in compared if run.method == OURS and run.q_head == "difference"]
    if ours:
        parts.append(f"Ours at other weights, without training again:\n\n{weights_table(ours)}")
        dpo = [[rows_of(found)[0]] for run, found in compared if run.method == "dpo"]
        parts += [against_dpo(dpo, by_weight(ours))] if dpo else []
    if searched:
        parts.append(f"Ours with other settings, `shared` unless said otherwise:\n\n{search_table(searched)}")
    swept = [found for _, found in ours if len(weights_of(found)) < len(rows_of(found))]
    parts += [f"The first run of ours at all dials:\n\n{frontier(found)}" for found in swept]
    return "\n\n".join(parts)


def _on_what(outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    """Model and pairs, which all runs on one data set share."""
    run, first = outcomes[0]
    heldout, trained = rows_of(first)[0]["accuracy"]["count"], first["pairs"]
    text = f"{run.model}, {trained} pairs of at most {run.longest} tokens to train on, {heldout} held out."
    notes = dict.fromkeys(found["note"] for _, found in outcomes if "note" in found)
    return " ".join([text, *(f"Rows with *: {note}." for note in notes)])


def is_searched(run: Run) -> bool:
    """Whether a run of ours differs from the compared ones in more than mode, head and seed."""
    compared = Run(OURS, run.model, run.train_pairs, kv_mode=run.kv_mode, q_head=run.q_head, seed=run.seed)
    return run.method == OURS and run != compared


def rows_of(found: Outcome) -> list[Row]:
    return list(found["rows"])


def weights_of(found: Outcome) -> list[Row]:
    """The rows in which the weight alone differs from the adapter's own dials, by weight."""
    home = rows_of(found)[0]["point"]
    own = [row for row in rows_of(found) if {**row["point"], "weight": home["weight"]} == home]
    return sorted(own, key=lambda row: float(row["point"]["weight"]))


def by_setting(outcomes: Sequence[tuple[Run, Outcome]]) -> list[tuple[Run, list[Outcome]]]:
    """The outcomes of all seeds of a run on one device."""
    groups: dict[tuple[Run, str], list[Outcome]] = {}
    for run, found in outcomes:
        groups.setdefault((dataclasses.replace(run, seed=0), found["device"]), []).append(found)
    return [(run, own) for (run, _), own in groups.items()]


def methods_table(outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    rows = [[*_names(run), *_measured(_home(own)), *_cost(own)] for run, own in by_setting(outcomes)]
    return table(COLUMNS, rows)


def search_table(outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    def changed(run: Run) -> str:
        default = Run(OURS, run.model, run.train_pairs)
        names = (field.name for field in dataclasses.fields(Run))
        return ", ".join(
            f"{name} {getattr(run, name)}" for name in names if getattr(run, name) != getattr(default, name)
        )

    columns = ("changed", *COLUMNS[3:])
    rows = [[changed(run), *_measured(_home(own)), *_cost(own)] for run, own in by_setting(outcomes)]
    return table(columns, rows)


# In the order of the tables.
LABELS = {"dpo": "DPO", "sft": "SFT", OURS: "Q-Adapter", "published": "Q-Adapter, published objective"}


def label_of(run: Run) -> str:
    return LABELS[run.method]


def _names(run: Run) -> list[str]:
    beta = "" if run.beta is None else f", beta {run.beta:g}"
    mode = {"published": "separate", OURS: run.kv_mode}.get(run.method, "own")
    head = {"published": "logits", OURS: run.q_head}.get(run.method, "")
    return [f"{label_of(run)} (lr {run.learning_rate:g}{beta})", mode, head]


def _measured(rows: Sequence[Row]) -> list[str]:
    """Of one setting, a row for each seed."""
    mean = statistics.mean
    accuracies = [row["accuracy"] for row in rows]
    low, high = interval(rows)
    return [
        str(len(rows)),
        f"{mean_accuracy(rows):.3f} [{low:.3f}, {high:.3f}]",
        ", ".join(f"{each['value']:.3f}" for each in accuracies) if len(rows) > 1 else "",
        f"{mean(row['margin']['value'] for row in rows):.2f}",
        f"{mean_kl(rows):.4f}",
        f"{mean(row['perplexity'] for row in rows):.2f}",
        f"{100 * mean(row['kept'] for row in rows):.1f}%",
    ]


def mean_accuracy(rows: Sequence[Row]) -> float:
    return statistics.mean(float(row["accuracy"]["value"]) for row in rows)


def interval(rows: Sequence[Row]) -> tuple[float, float]:
    """The mean interval of the accuracy."""
    low, high = (statistics.mean(float(row["accuracy"][end]) for row in rows) for end in ("low", "high"))
    return low, high


def mean_kl(rows: Sequence[Row]) -> float:
    return statistics.mean(float(row["kl"]) for row in rows)


def _home(own: Sequence[Outcome]) -> list[Row]:
    """At the dials that a run was trained with."""
    return [rows_of(each)[0] for each in own]


def _cost(own: Sequence[Outcome]) -> list[str]:
    seconds, peak = (statistics.mean(each[name] for each in own) for name in ("seconds", "peak_mib"))
    return [f"{seconds:.0f}", f"{peak:.0f}", own[0]["device"] + " *" * any("note" in each for each in own)]


def weights_table(outcomes: Sequence[tuple[Run, Outcome]]) -> str:
    """Each setting at every weight."""
    columns = ("KV mode", "weight", *COLUMNS[3:10])
    rows = [
        [run.kv_mode, f"{weight:g}", *_measured(own)]
        for run, points in by_weight(outcomes).items()
        for weight, own in points.items()
    ]
    return table(columns, rows)


def by_weight(outcomes: Sequence[tuple[Run, Outcome]]) -> dict[Run, dict[float, list[Row]]]:
    """Rows of a setting, one for each seed, at each weight, the largest first: of the seeds that were measured at
    several weights, at those that all of these have."""
    found = {}
    for run, own in by_setting(outcomes):
        seeds = [{float(row["point"]["weight"]): row for row in weights_of(each)} for each in own]
        seeds = [each for each in seeds if len(each) > 1] or seeds
        common = sorted(set.intersection(*map(set, seeds)), reverse=True)
        found[run] = {weight: [each[weight] for each in seeds] for weight in common}
    return found


def frontier(found: Outcome) -> str:
    """Every swept setting of the dials."""
    rows = [[*(f"{row['point'][dial]:g}" for dial in DIALS), *_measured([row])] for row in rows_of(found)]
    kept = [index for index, name in enumerate((*DIALS, *COLUMNS[3:10])) if name not in ("seeds", "by seed")]
    return table([(*DIALS, *COLUMNS[3:10])[index] for index in kept], [[row[index] for index in kept] for row in rows])


def against_dpo(dpo: Sequence[Sequence[Row]], ours: Mapping[Run, Mapping[float, Sequence[Row]]]) -> str:
    """Whether ours, as means over the seeds, reaches the accuracy of the best DPO run at half its KL at some weight."""
    best = min(dpo, key=lambda rows: (-mean_accuracy(rows), mean_kl(rows)))
    bar = f"The best DPO run has accuracy {mean_accuracy(best):.3f} at KL {mean_kl(best):.4f}. "
    enough = [
        (run, weight, rows)
        for run, points in ours.items()
        for weight, rows in points.items()
        if mean_accuracy(rows) >= mean_accuracy(best) and 2 * mean_kl(rows) <= mean_kl(best)
    ]
    if not enough:
        return bar + "No weight of ours reaches that at half the KL."
    run, weight, rows = max(enough, key=lambda each: (len(each[2]), mean_accuracy(each[2])))  # most seeds first
    seeds = f", the mean of {len(rows)} seeds" if len(rows) > 1 else ""
    found = f"Ours in `{run.kv_mode}` mode at weight {weight:g} has {mean_accuracy(rows):.3f} at {mean_kl(rows):.4f}"
    overlap = interval(rows)[0] <= interval(best)[1]
    caveat = "Both are the best of several settings on these very pairs" + ", and their intervals overlap" * overlap
    return f"{bar}{found}{seeds}. ({caveat}.)"
