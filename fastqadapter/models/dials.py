"""What can be turned at inference, and the logits that come of it.

By identity 1 the hidden states are combined before the LM head: `logits = W (sum_i w_i d^i + alpha_0 h_b) /
alpha_tilde`, one product with the head whatever the number of adapters. A soft-cap forbids that; then each stream's
capped logits are formed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastqadapter.config import QHead
from fastqadapter.loss import LMHead
from fastqadapter.ops.checks import accumulation_dtype, check_alphas

LARGEST_SHARE = 1e6
Weight = float | Sequence[float] | Tensor  # of an adapter: one number, or one for each sequence of the batch


@dataclasses.dataclass(frozen=True)
class Dials:
    """`alpha_0`, `alpha_tilde` and the weight of each adapter, per call; a weight may be a tensor (B,), one for each
    sequence of the batch.

    Raises:
        ValueError: a number outside its range, or a mixture that a `logits` head cannot express.
    """

    alpha_0: float
    alpha_tilde: float
    weights: Mapping[str, float | Tensor]
    q_head: QHead = "difference"

    def __post_init__(self) -> None:
        check_alphas(self.alpha_0, self.alpha_tilde)
        for name, weight in {"alpha_0": self.alpha_0, **self.weights}.items():
            largest = max(weight.tolist(), key=abs) if isinstance(weight, Tensor) else weight
            if abs(largest) > LARGEST_SHARE * self.alpha_tilde:
                raise ValueError(
                    f"{name}: {largest:g} / alpha_tilde {self.alpha_tilde:g} is above {LARGEST_SHARE:g}, where logits "
                    "overflow; a share that large is the plain argmax: use do_sample=False"
                )
        alone = [weight for weight in self.weights.values() if not isinstance(weight, Tensor)] == [1.0]
        if self.q_head == "logits" and not (alone and len(self.weights) == 1):
            raise ValueError(
                f"adapters={dict(self.weights)} needs q_head='difference': with 'logits' each adapter holds the base "
                "logits too, so it can only be used alone and with weight 1"
            )

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters whose stream is run: weight 0 means "not there"."""
        return tuple(name for name, weight in self.weights.items() if isinstance(weight, Tensor) or weight != 0.0)

    def shares(self, streams: int, batch: int) -> list[float | Tensor]:
        """What each stream's hidden states are multiplied by, those of the base last: a number, or (batch, 1, 1)."""
        weights = [_of_rows(name, self.weights[name], batch) for name in self.adapters[: streams - 1]]
        return [*weights, self.alpha_0]


def checked_weight(name: str, weight: Any) -> float | Tensor:
    """A weight as the user gives it: a finite number, or several, one for each sequence.

    Raises:
        ValueError: it is neither.
    """
    several = isinstance(weight, (Sequence, Tensor)) and not isinstance(weight, str)
    values = weight.tolist() if isinstance(weight, Tensor) else list(weight) if several else [weight]
    if not isinstance(values, list):  # a tensor of no dimension
        values, several = [values], False
    finite = all(isinstance(value, Real) and math.isfinite(value) for value in values)
    if not values or not finite:
        raise ValueError(f"adapters={{{name!r}: {weight!r}}}: the weight is not a finite number, nor a list of them")
    return torch.tensor(values, dtype=torch.float64) if several else float(values[0])


def _of_rows(name: str, weight: float | Tensor, batch: int) -> float | Tensor:
    """A weight for each row; beams and further sequences of one prompt stand side by side, as `generate` has them."""
    if not isinstance(weight, Tensor):
        return weight
    if batch % len(weight):
        raise ValueError(
            f"adapters: {len(weight)} weights of {name!r} for {batch} sequences: give one, or one for each"
        )
    return weight.repeat_interleave(batch // len(weight))[:, None, None]


def combined_logits(hidden: Tensor, head: LMHead, dials: Dials) -> Tensor:
    """Logits (B, L, V) of the customised policy, up to a constant of each row, from the last hidden states of the
    streams (S, B, L, D), the base's first and then those of `dials.adapters`."""
    dtype = accumulation_dtype(head.weight.dtype)
    *weights, alpha_0 = dials.shares(*hidden.shape[:2])
    difference = dials.q_head == "difference"

    def combine(base: Tensor, *others: Tensor) -> Tensor:
        total = alpha_0 * base
        for weight, q in zip(weights, others, strict=True):
            weight = weight.to(q.device) if isinstance(weight, Tensor) else weight
            total = total + weight * (q - base if difference else q)
        return total

    if head.softcap is not None:
        products = F.linear(hidden.to(head.weight.dtype), head.weight).to(dtype)
        return combine(*head.scale_and_cap(products, head.bias)) / dials.alpha_tilde
    scaled = combine(*hidden.to(dtype)) * (head.logit_scale / dials.alpha_tilde)
    logits = F.linear(scaled.to(head.weight.dtype), head.weight)
    if head.bias is None:
        return logits
    bias_shares = dials.alpha_0 + (0.0 if difference else 1.0)
    return logits + head.bias * (bias_shares * head.logit_scale / dials.alpha_tilde)
