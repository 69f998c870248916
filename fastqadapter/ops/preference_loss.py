"""Preference loss of a batch of pairs, from taken values and soft values.

    r_t    = q_t[a_t] - gamma v(row of the value), 0 for the terminal state
    margin = (sum_t r_t^chosen - sum_t r_t^rejected) / divisor
    loss   = mean over pairs of  -log sigmoid(margin) + beta mean_t r_t^2

M transitions, S state rows, B pairs. Source: Li et al. 2024, https://arxiv.org/abs/2407.03856 (preference loss on the
rewards of the inverse soft Bellman operator).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastqadapter.ops import checks
from fastqadapter.ops.backends import Implementation, choose, fused_implementations


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which transitions make up which branch: branch 2i is the chosen, 2i + 1 the rejected response of pair i."""

    value_rows: Tensor  # (M,) int64, row of `values` that belongs to each transition; -1: terminal, value 0
    branch_ends: Tensor  # (2B + 1,) int64, branch j holds the transitions branch_ends[j] to branch_ends[j + 1]
    divisor: Tensor  # (B,) fp32
    squares_divisor: Tensor  # (B,) fp32: the transitions that the mean of r^2 is taken over

    def __len__(self) -> int:
        return self.divisor.shape[0]

    def branch_of_transitions(self) -> Tensor:
        """(M,) int64: the branch of each transition."""
        branches = torch.arange(2 * len(self), device=self.branch_ends.device)
        return torch.repeat_interleave(branches, self.branch_ends.diff(), output_size=self.value_rows.shape[0])


class LossConfig(Protocol):
    """The two numbers that the loss takes from a `QAdapterConfig`."""

    @property
    def gamma(self) -> float: ...
    @property
    def beta(self) -> float: ...


def branch_sums(per_transition: Tensor, pairs: Pairs) -> Tensor:  # (M,) -> (B, 2)
    """Sum over the transitions of each branch; column 0 chosen, column 1 rejected."""
    sums = per_transition.new_zeros(2 * len(pairs))
    return sums.index_add(0, pairs.branch_of_transitions(), per_transition).view(-1, 2)


def rewards(q_taken: Tensor, values: Tensor, pairs: Pairs, gamma: float) -> Tensor:  # (M,)
    """Reward of each transition by the inverse soft Bellman operator, `r_t = q_t[a_t] - gamma v`."""
    following = values.index_select(0, pairs.value_rows.clamp(min=0)).masked_fill(pairs.value_rows < 0, 0.0)
    return q_taken - gamma * following


def preference_loss_ref(
    q_taken: Tensor,  # (M,)
    values: Tensor,  # (S,)
    pairs: Pairs,
    gamma: float,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition; gradients by autograd."""
    reward = rewards(q_taken, values, pairs, gamma)
    reward_sums = branch_sums(reward, pairs) / pairs.divisor[:, None].to(reward.dtype)
    margin = reward_sums[:, 0] - reward_sums[:, 1]
    # An infinite reward must not hide: -log sigmoid(inf) is 0, a wrong finite number, and 0 * inf is NaN.
    preference = -F.logsigmoid(margin) + 0.0 * branch_sums(reward, pairs).sum(dim=1)
    squares = branch_sums(reward.square(), pairs).sum(dim=1) / pairs.squares_divisor.to(reward.dtype)
    loss = (preference + beta * squares).mean()

    with torch.no_grad():
        counts = pairs.branch_ends.diff().view(-1, 2).sum(dim=1).clamp(min=1).to(reward.dtype)
        metrics = {
            "pref_loss": preference,
            "chi2_loss": squares,
            "rewards/chosen": reward_sums[:, 0],
            "rewards/rejected": reward_sums[:, 1],
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).to(margin.dtype) + 0.5 * (margin == 0),
            "q_values/mean": branch_sums(q_taken, pairs).sum(dim=1) / counts,
            "values/mean": branch_sums(q_taken - reward, pairs).sum(dim=1) / counts,
        }
    return loss, {name: value.detach() for name, value in metrics.items()}


def _fused(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    from fastqadapter.ops.fused.preference_loss import preference_loss_fused

    return preference_loss_fused(*args)


IMPLEMENTATIONS = {
    **fused_implementations("preference_loss", _fused),
    "torch": Implementation(preference_loss_ref),
    "eager": Implementation(preference_loss_ref),
}


def preference_loss(
    q_taken: Tensor,  # (M,)
    values: Tensor,  # (S,)
    pairs: Pairs,
    config: LossConfig,
    *,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over pairs of `-log sigmoid(margin) + beta mean_t r_t^2`, with `r_t = q_t[a_t] - gamma v` and `margin` the
    difference of the reward sums, chosen - rejected, over the divisor.

    Args:
        q_taken: (M,) `q_t[a_t]` of every transition, in the order of `pairs`.
        values: (S,) soft values of the state rows.
        pairs: which transitions form which branch; built by `fastqadapter.loss.pair_transitions`.
        config: a `QAdapterConfig`, or anything with `gamma` and `beta`.
        backend: `auto`, `triton`, `cpu`, `torch` or `eager`.

    Returns:
        The scalar loss, and per-pair metrics, (B,) each and detached: `pref_loss`, `chi2_loss`, `rewards/chosen`,
        `rewards/rejected` (sums over the divisor), `rewards/margins`, `rewards/accuracies` (a tie counts 0.5, so an
        untrained adapter is at chance), `q_values/mean`, `values/mean` (gamma v, as it enters the rewards). A reward
        that is NaN or infinite makes the loss NaN or infinite, never a wrong finite number.

    Raises:
        ValueError: no pair, or shapes, dtypes or devices that do not fit.
    """
    if len(pairs) == 0:
        raise ValueError("pairs holds 0 pairs; the loss is a mean over at least one")
    transitions = pairs.value_rows.shape[0]
    if tuple(q_taken.shape) != (transitions,):
        raise ValueError(f"q_taken has shape {tuple(q_taken.shape)}; expected (M,) = ({transitions},) as in pairs")
    if values.dim() != 1:
        raise ValueError(f"values has shape {tuple(values.shape)}; expected (S,)")
    if q_taken.dtype != values.dtype or q_taken.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"q_taken is {q_taken.dtype}, values {values.dtype}; expected both float32 or both float64")
    checks.check_device("values", values, q_taken, reference="q_taken")
    checks.check_number("gamma", config.gamma)
    checks.check_number("beta", config.beta)
    _check_pairs(pairs, q_taken, values)
    args = (q_taken, values, pairs, config.gamma, config.beta)
    return choose("preference_loss", IMPLEMENTATIONS, backend, *args)(*args)


def _check_pairs(pairs: Pairs, q_taken: Tensor, values: Tensor) -> None:
    """Raise a ValueError unless the fields of `pairs` have the sizes, dtypes and the device that they must have, and on
    the CPU also their indices."""
    count, transitions = len(pairs), q_taken.shape[0]
    for name, size, letters in (
        ("value_rows", transitions, "M"),
        ("branch_ends", 2 * count + 1, "2B + 1"),
        ("divisor", count, "B"),
        ("squares_divisor", count, "B"),
    ):
        shape = tuple(getattr(pairs, name).shape)
        if shape != (size,):
            raise ValueError(f"pairs.{name} has shape {shape}; expected ({letters},) = ({size},)")
    for field in dataclasses.fields(pairs):
        tensor = getattr(pairs, field.name)
        if field.name in ("value_rows", "branch_ends") and tensor.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"pairs.{field.name} has dtype {tensor.dtype}; expected torch.int64 or torch.int32")
        checks.check_device(f"pairs.{field.name}", tensor, q_taken, reference="q_taken")
        if tensor.requires_grad:
            raise ValueError(f"pairs.{field.name}.requires_grad=True, but it gets no gradient: pass it detached")
    checks.check_index("pairs.value_rows: row", pairs.value_rows.clamp(min=0), values.shape[0] or 1, "values")
    ends = pairs.branch_ends
    if ends.device.type != "cpu" or torch.compiler.is_compiling():  # as in check_index
        return
    if int(ends[0]) != 0 or int(ends[-1]) != transitions or bool((ends.diff() < 0).any()):
        raise ValueError(f"pairs.branch_ends={ends.tolist()} does not rise from 0 to M = {transitions}")
