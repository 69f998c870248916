"""Which runs are compared, and which look for what decides."""

from __future__ import annotations

import dataclasses
from typing import Any

from methods import Run

SEEDS = (0, 1, 2)
KV_MODES = ("shared", "prompt", "separate")
SWEPT = "q-adapter-shared-0"  # is measured at all dials that `fastqadapter eval` sweeps
WEIGHTS = (0.25, 0.5)  # of the other compared runs of ours

# What is changed, one at a time, from the run that the first of ours is.
SEARCH: dict[str, tuple[Any, ...]] = {
    "learning_rate": (5e-5, 1e-4, 3e-4, 2e-3),
    "divisor": ("1", "32", "max_length"),
    "beta": (0.1,),
}


def compare(model: str, train_pairs: str) -> dict[str, Run]:
    """The methods, by the name of a run's folder; three seeds of ours in its default mode."""
    shared = {"model": model, "train_pairs": train_pairs}
    runs: dict[str, Run] = {}
    for rate in (5e-5, 2e-4, 5e-4):
        runs[f"dpo-0.1-{rate:g}"] = Run("dpo", beta=0.1, learning_rate=rate, **shared)
    runs["sft-0.0002"] = Run("sft", learning_rate=2e-4, **shared)
    for seed in SEEDS:
        runs[f"q-adapter-shared-{seed}"] = Run("q-adapter", seed=seed, **shared)
    for kv_mode in KV_MODES[1:]:
        runs[f"q-adapter-{kv_mode}-0"] = Run("q-adapter", kv_mode=kv_mode, **shared)
    runs["q-adapter-logits"] = Run("q-adapter", kv_mode="separate", q_head="logits", **shared)
    runs["published-0.0005"] = Run("published", learning_rate=5e-4, **shared)
    return runs


def ablation(model: str, train_pairs: str) -> dict[str, Run]:
    """Further seeds of the other KV modes."""
    return {
        f"q-adapter-{kv_mode}-{seed}": Run("q-adapter", model, train_pairs, kv_mode=kv_mode, seed=seed)
        for kv_mode in KV_MODES[1:]
        for seed in SEEDS[1:]
    }


def search(model: str, train_pairs: str) -> dict[str, Run]:
    """Runs around the first of ours, and DPO at other betas, to see what decides."""
    center = Run("q-adapter", model, train_pairs)
    runs = {
        f"{name}-{value}-0": dataclasses.replace(center, **{name: value})
        for name, values in SEARCH.items()
        for value in values
    }
    runs["separate-5e-05-0"] = Run("q-adapter", model, train_pairs, kv_mode="separate", learning_rate=5e-5)  # as DPO's
    for beta in (0.5, 0.03):
        runs[f"dpo-{beta:g}-0.0002"] = Run("dpo", model, train_pairs, beta=beta, learning_rate=2e-4)
    return runs


def eval_options(label: str) -> list[str]:
    """Options of `fastqadapter eval`: where a run is measured beside its own dials."""
    if label == SWEPT:
        return []
    if label.startswith(tuple(f"q-adapter-{kv_mode}" for kv_mode in KV_MODES)):
        return ["--weight", *map(str, WEIGHTS), "--alpha_0", "1", "--alpha_tilde", "1"]
    return ["--sweep", "false"]


PLANS = {"compare": compare, "ablation": ablation, "search": search}
