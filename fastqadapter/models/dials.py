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

from fastqadapter.config import QAdapterConfig, QHead
from fastqadapter.loss import LMHead
from fastqadapter.ops.checks import accumulation_dtype, check_alphas

# Of alpha_tilde; beyond, logits overflow: in fp16, which ends at 65504, those of a few hundred would.
LARGEST_SHARE, LARGEST_SHARE_FP16 = 1e6, 100.0
Weight = float | Sequence[float] | Tensor  # of an adapter: one number, or one for each sequence of the batch


@dataclasses.dataclass(frozen=True)
class Dials:
    """`alpha_0`, `alpha_tilde` and the weight of each adapter, per call; a weight may be a tensor (B,), one for each
    sequence of the batch.

    Raises:
        ValueError: an alpha outside its range, or a mixture that a `logits` head cannot express.
    """

    alpha_0: float
    alpha_tilde: float
    weights: Mapping[str, float | Tensor]
    q_head: QHead = "difference"

    def __post_init__(self) -> None:
        check_alphas(self.alpha_0, self.alpha_tilde)
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

    def _check_shares(self, bound: float) -> None:
        for name, weight in {"alpha_0": self.alpha_0, **self.weights}.items():
            largest = max(weight.tolist(), key=abs) if isinstance(weight, Tensor) else weight
            if abs(largest) > bound * self.alpha_tilde:
                raise ValueError(
                    f"{name}: {largest:g} / alpha_tilde {self.alpha_tilde:g} is above {bound:g}, where logits "
                    "overflow; a share that large is the plain argmax: use do_sample=False"
                )

    def mixture(self, head: LMHead) -> Mixture:
        """The dials as tensors beside the LM head.

        Raises:
            ValueError: logits would overflow, or weights for different numbers of sequences.
        """
        self._check_shares(LARGEST_SHARE_FP16 if head.weight.dtype == torch.float16 else LARGEST_SHARE)
        per_row = [weight for weight in self.weights.values() if isinstance(weight, Tensor)]
        length = len(per_row[0]) if per_row else 1
        if any(len(weight) != length for weight in per_row):
            counts = {name: len(weight) for name, weight in self.weights.items() if isinstance(weight, Tensor)}
            raise ValueError(f"adapters: as many weights for one as for another, not {counts}")
        shares = torch.empty(1 + len(self.adapters), length, dtype=torch.float64)
        for row, share in zip(shares, (self.alpha_0, *map(self.weights.__getitem__, self.adapters)), strict=True):
            row[:] = torch.as_tensor(share)
        shares = (shares / self.alpha_tilde).to(head.weight.device, accumulation_dtype(head.weight.dtype))
        return Mixture(shares, self.q_head == "difference")


def dials_of(
    configs: Mapping[str, QAdapterConfig],
    active: str,
    alpha_0: float | None,
    alpha_tilde: float | None,
    adapters: Mapping[str, Weight] | None,
) -> Dials:
    """The dials of a call on a model with these adapters: the config's alphas where none are given, no weight 0.

    Raises:
        ValueError: `adapters` is no mapping or names one that is not loaded; a number outside its range.
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise ValueError(
            f"adapters={adapters!r} is a {type(adapters).__name__}; give a weight by name: {{'default': 1.0}}"
        )
    weights: dict[str, Weight] = {active: 1.0} if adapters is None else dict(adapters)
    unknown = sorted((name for name in weights if name not in configs), key=str)
    if unknown:
        raise ValueError(f"adapters {unknown} are not loaded; loaded are {sorted(configs)}")
    checked = {name: checked_weight(name, weight) for name, weight in weights.items()}
    [*others, last] = checked or [active]
    config = configs[active if others else last]
    present = {name: weight for name, weight in checked.items() if isinstance(weight, Tensor) or weight != 0.0}
    return Dials(
        alpha_0=config.alpha_0 if alpha_0 is None else alpha_0,
        alpha_tilde=config.alpha_tilde if alpha_tilde is None else alpha_tilde,
        weights=present,
        q_head="logits" if "logits" in {configs[name].q_head for name in present} else "difference",
    )


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What the streams are multiplied by before they are added up. Tensors: compiled decoding serves any numbers."""

    shares: Tensor  # (S, 1), or (S, sequences): alpha_0 / alpha_tilde, then w_i / alpha_tilde
    difference: bool

    def check_sequences(self, sequences: int) -> None:
        """Raise a ValueError where there are weights for another number of sequences."""
        given = self.shares.shape[1]
        if given not in (1, sequences):
            raise ValueError(
                f"adapters: {given} weights of one adapter for {sequences} sequences: give one number, or one for each"
            )

    def of_rows(self, batch: int) -> Tensor:
        """(S, 1 or batch, 1, 1); beams and further sequences of one prompt stand side by side, as `generate` has
        them."""
        given = self.shares.shape[1]
        shares = self.shares if given == 1 else self.shares.repeat_interleave(batch // given, dim=1)
        return shares[..., None, None]

    def combine(self, streams: Tensor) -> Tensor:
        """`sum_i w_i q^i + alpha_0 b`, over alpha_tilde; `streams` (S, B, L, any), the base's first."""
        base_share, *shares = self.of_rows(streams.shape[1])
        base, *others = streams
        total = base_share * base
        for share, other in zip(shares, others, strict=True):
            total = total + share * (other - base if self.difference else other)
        return total


def checked_weight(name: str, weight: Any) -> float | Tensor:
    """A weight as the user gives it: a finite number, or several, one for each sequence.

    Raises:
        ValueError: it is neither.
    """
    values: Any = weight.tolist() if hasattr(weight, "tolist") else weight
    several = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    values = list(values) if several else [values]
    if not values or not all(map(_is_finite, values)):
        given = " ".join(repr(weight).split())[:80]
        raise ValueError(f"adapters={{{name!r}: {given}}}: the weight is not a finite number, nor a list of them")
    return torch.tensor(values, dtype=torch.float64) if several else float(values[0])


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer above 1e308
        return False


def combined_logits(hidden: Tensor, head: LMHead, mixture: Mixture) -> Tensor:
    """Logits (B, L, V) of the customised policy, up to a constant of each row, from the last hidden states of the
    streams (S, B, L, D), the base's first and then those of the dials' adapters."""
    dtype = accumulation_dtype(head.weight.dtype)
    if head.softcap is not None:
        products = F.linear(hidden.to(head.weight.dtype), head.weight).to(dtype)
        return mixture.combine(head.scale_and_cap(products, head.bias))
    combined = mixture.combine(hidden.to(dtype)) * head.logit_scale
    logits = F.linear(combined.to(head.weight.dtype), head.weight)
    if head.bias is None:
        return logits
    shares = mixture.of_rows(hidden.shape[1])  # in a difference the bias cancels
    bias_share = shares[0] if mixture.difference else shares.sum(dim=0)
    return logits + head.bias * (bias_share * head.logit_scale).to(logits.dtype)
