"""Which runs are compared, and which of ours look for what decides."""

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
    "learning_rate": (1e-4, 3e-4, 2e-3),
    "divisor": ("1", "32", "max_length"),
    "beta": (0.1, 1.0),
    "epochs": (1.0,),
    "rank": (32,),
}


def plan(model: str, train_pairs: str) -> dict[str, Run]:
    """The runs that are compared, by the name of their folder."""
    shared = {"model": model, "train_pairs": train_pairs}
    runs: dict[str, Run] = {}
    for beta, rate in ((0.1, 5e-5), (0.1, 2e-4), (0.1, 5e-4), (0.5, 2e-4), (0.03, 2e-4)):
        runs[f"dpo-{beta:g}-{rate:g}"] = Run("dpo", beta=beta, learning_rate=rate, **shared)
    runs["sft-0.0002"] = Run("sft", learning_rate=2e-4, **shared)
    for kv_mode in KV_MODES:
        for seed in SEEDS:
            runs[f"q-adapter-{kv_mode}-{seed}"] = Run("q-adapter", kv_mode=kv_mode, seed=seed, **shared)
    runs["q-adapter-logits"] = Run("q-adapter", kv_mode="separate", q_head="logits", **shared)
    runs["published-0.0005"] = Run("published", learning_rate=5e-4, **shared)
    return runs


def search(model: str, train_pairs: str) -> dict[str, Run]:
    """Runs of ours around the first, to see what decides."""
    center = Run("q-adapter", model=model, train_pairs=train_pairs)
    return {
        f"{name}-{value}-0": dataclasses.replace(center, **{name: value})
        for name, values in SEARCH.items()
        for value in values
    }


def eval_options(label: str) -> list[str]:
    """Options of `fastqadapter eval`: where a run is measured beside its own dials."""
    if label == SWEPT:
        return []
    if label.startswith(tuple(f"q-adapter-{kv_mode}" for kv_mode in KV_MODES)):
        return ["--weight", *map(str, WEIGHTS), "--alpha_0", "1", "--alpha_tilde", "1"]
    return ["--sweep", "false"]


PLANS = {"compare": plan, "search": search}
