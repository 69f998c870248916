"""Log-probabilities and KL of response tokens under the customised policy, for many dials from two products.

Logits of every dial are sums of the same two, `z = (w q + alpha_0 b) / alpha_tilde` with `b = W h_b` and `q = W (h_q -
h_b)` (docs/mathematics.md, identity 1), so that P points cost two products with the LM head and P softmaxes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastqadapter.models import QAdapterModel
from fastqadapter.models.base import lm_head_of
from fastqadapter.models.dials import Dials, checked_weight
from fastqadapter.packing import PackedPairs

LOGITS = 2**22  # at a time: 16 MiB, which allocators keep and use again


@dataclasses.dataclass(frozen=True)
class Point:
    """Dials of a customised policy with one adapter: `softmax((weight q + alpha_0 log pi) / alpha_tilde)`.

    Raises:
        ValueError: an alpha outside its range, or a weight that is not finite.
    """

    alpha_0: float = 1.0
    alpha_tilde: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        Dials(self.alpha_0, self.alpha_tilde, {"weight": checked_weight("weight", self.weight)})

    def generate_options(self, adapter: str) -> dict[str, Any]:
        """What `QAdapterModel.generate` takes for it."""
        return {"alpha_0": self.alpha_0, "alpha_tilde": self.alpha_tilde, "adapters": {adapter: self.weight}}

    def __str__(self) -> str:
        return f"weight {self.weight:g}, alpha_0 {self.alpha_0:g}, alpha_tilde {self.alpha_tilde:g}"


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Of the M response tokens of a packed batch, branch after branch; fp32."""

    base: Tensor  # (M,) log pi(a | s)
    policy: Tensor  # (P, M) log pi~(a | s) at each point
    kl: Tensor  # (P, M) KL(pi || pi~) at s, nats


@torch.no_grad()
def score_tokens(model: QAdapterModel, batch: PackedPairs, points: Sequence[Point]) -> TokenScores:
    """Score the response tokens of a batch (pairs, or prompts with any number of responses) with the active adapter.

    In fp32 from the last hidden states on, whatever their dtype.

    Raises:
        ValueError: a weight other than 0 and 1 of an adapter whose `q_head` is `logits`; scores that are not finite.
    """
    config, head = model.qadapter_config, lm_head_of(model.get_base_model())
    difference = config.q_head != "logits"
    for point in points:
        model.dials(**point.generate_options(model.active_adapter))
    batch = batch.to(model.device)
    states = batch.action_states()
    hidden_q, hidden_b = model.hidden_states(batch)
    weight = head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    size = max(1, LOGITS // len(weight))
    for rows, actions in zip(states.split(size), batch.actions.split(size), strict=True):
        b, q = (
            head.scale_and_cap(F.linear(hidden.index_select(0, rows).float(), weight), bias)
            for hidden in (hidden_b, hidden_q)
        )
        found.append(_score_rows(b, q - b if difference else q, actions[:, None], points))
    base, policy, kl = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    for point, finite in zip(points, policy.isfinite().all(dim=1).tolist(), strict=True):
        if not finite:
            raise ValueError(
                f"log-probabilities at {point} are not finite: the base or the adapter overflows in its dtype"
            )
    return TokenScores(base, policy, kl)


def _score_rows(b: Tensor, q: Tensor, actions: Tensor, points: Sequence[Point]) -> tuple[Tensor, Tensor, Tensor]:
    """`b`, `q` (rows, V), `actions` (rows, 1) -> (rows,), (P, rows), (P, rows)."""
    log_pi = F.log_softmax(b, dim=-1)
    pi = log_pi.exp()
    log_probs, kl = [], []
    for point in points:
        z = (b * (point.alpha_0 / point.alpha_tilde)).add_(q, alpha=point.weight / point.alpha_tilde)
        log_policy = F.log_softmax(z, dim=-1)
        log_probs.append(log_policy.gather(1, actions)[:, 0])
        # The difference first: sum(pi) is 1 but for rounding, which against an lse of 20 would be a KL of 5e-5.
        kl.append(torch.linalg.vecdot(pi, torch.sub(log_pi, log_policy, out=log_policy)))
    return log_pi.gather(1, actions)[:, 0], torch.stack(log_probs), torch.stack(kl)
