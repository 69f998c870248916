"""Has the preference been learned: accuracy and margin of the implicit reward on held-out pairs.

The implicit reward of a response is `log pi~(y | x) - log pi(y | x)`, what the policy says more of than the base. At
`alpha_0 = alpha_tilde = gamma = 1` the sum of the method's own rewards, `sum q_t - v_{t+1}`, is that plus `v` of the
prompt, which both branches share: the margin is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastqadapter.evaluation.intervals import Mean, bootstrap_mean
from fastqadapter.evaluation.scores import TokenScores
from fastqadapter.packing import PackedPairs

SIMILAR = 1.2  # lengths whose ratio is at most this count as similar
BUCKETS = ("chosen shorter", "similar length", "chosen longer")


@dataclasses.dataclass(frozen=True)
class PairScores:
    """Of B held-out pairs, at each of P points."""

    rewards: Tensor  # (P, B, 2): chosen, rejected; nats
    lengths: Tensor  # (B, 2): tokens
    kl: Tensor  # (P, B): mean over the tokens of both responses

    @staticmethod
    def of(batch: PackedPairs, scores: TokenScores) -> PairScores:
        lengths = torch.tensor([responses for _, *responses in batch.lengths])  # (B, 2)
        branch = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())  # (M,)
        points = len(scores.policy)

        def sums(tokens: Tensor) -> Tensor:
            zeros = torch.zeros(points, lengths.numel(), dtype=torch.float64)
            return zeros.index_add_(1, branch, tokens.double().cpu()).view(points, -1, 2)

        kl = sums(scores.kl).sum(dim=2) / lengths.sum(dim=1)
        return PairScores(sums(scores.policy - scores.base), lengths, kl)

    @staticmethod
    def join(parts: Sequence[PairScores]) -> PairScores:
        return PairScores(
            torch.cat([part.rewards for part in parts], dim=1),
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.kl for part in parts], dim=1),
        )

    def at(self, point: int) -> Learning:
        """What one point has learned."""
        margins = self.rewards[point, :, 0] - self.rewards[point, :, 1]
        right = (margins > 0).double() + 0.5 * (margins == 0)  # no opinion is half right
        ratio = self.lengths[:, 0] / self.lengths[:, 1]
        inside = (ratio < 1 / SIMILAR, (ratio >= 1 / SIMILAR) & (ratio <= SIMILAR), ratio > SIMILAR)
        return Learning(
            accuracy=bootstrap_mean(right),
            margin=bootstrap_mean(margins),
            by_length={
                name: bootstrap_mean(right[bucket])
                for name, bucket in zip(BUCKETS, inside, strict=True)
                if bucket.any()
            },
            kl_on_pairs=float(self.kl[point].mean()),
        )


@dataclasses.dataclass(frozen=True)
class Learning:
    """Preference accuracy, margin (nats) and accuracy by which response is longer."""

    accuracy: Mean
    margin: Mean
    by_length: dict[str, Mean]
    kl_on_pairs: float  # KL(pi || pi~), nats per token, at the states of the held-out responses
