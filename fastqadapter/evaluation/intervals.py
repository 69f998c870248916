"""Bootstrap confidence intervals of means."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
AT_ONCE = 2**24  # drawn items, 128 MiB


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over `count` items with its interval."""

    value: float
    low: float
    high: float
    count: int


def bootstrap_mean(values: Tensor, *, seed: int = 0, resamples: int = RESAMPLES) -> Mean:
    """Mean of `values` (N,) with the percentile bootstrap interval of level 0.95 over the N items.

    Efron & Tibshirani, An Introduction to the Bootstrap, chapter 13. The same seed draws the same items for every
    metric of one set, so that intervals of several points can be compared.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("a mean of no values")
    count = len(values)
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    step = max(1, AT_ONCE // count)
    sizes = (min(step, resamples - start) for start in range(0, resamples, step))
    means = [values[torch.randint(count, (size, count), generator=generator)].mean(dim=1) for size in sizes]
    tail = (1 - LEVEL) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Mean(float(values.mean()), low, high, count)
