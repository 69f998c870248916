"""Which Q rows run behind the tokens of a step, and how their hidden states are combined with the base's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastqadapter.integrations.vllm.served import RequestDials


@dataclasses.dataclass(frozen=True)
class QRows:
    """R rows behind the N tokens of a step. Row r is a copy of token `tokens[r]`, on which adapter `adapters[r]` acts.

    A step combines T of its tokens, those whose logits are wanted.
    """

    tokens: Tensor  # (R,)
    streams: Tensor  # (R,), 1 to S: which Q stream of its token
    adapters: Tensor  # (R,)
    shares: Tensor  # (R, 1), fp32: w / alpha_tilde
    combined: Tensor  # (T,), tokens
    base_shares: Tensor  # (T, 1), fp32: (alpha_0 - sum of w) / alpha_tilde
    combined_index: Tensor  # (R,): which of the T is that of the row
    in_order: bool  # row r is token r, one for each

    def behind(self, x: Tensor, dim: int = 0) -> Tensor:
        """`x` of the tokens, with that of the rows behind it."""
        return torch.cat([x, x.index_select(dim, self.tokens)], dim=dim)

    def combine(self, hidden: Tensor) -> Tensor:
        """(N + R, D) -> (N, D): `base_share h_b + sum_i share_i h_i` for the tokens that are combined.

        In fp32: a small alpha_tilde would magnify the rounding of 16 bits.
        """
        base, adapted = hidden.split([len(hidden) - len(self.tokens), len(self.tokens)])
        total = base[self.combined].float() * self.base_shares
        total.index_add_(0, self.combined_index, adapted.float() * self.shares)
        return base.index_copy(0, self.combined, total.to(hidden.dtype))


def rows_of_step(
    starts: Sequence[int],
    requests: Sequence[RequestDials],
    every_token: Sequence[bool],
    device: torch.device,
) -> QRows | None:
    """The rows of a step in which request i has the tokens `starts[i]` to `starts[i + 1]`; None: the base alone.

    The last token of a request has rows, or all where `every_token`; a token has one for each adapter.
    """
    tokens: list[int] = []
    streams: list[int] = []
    adapters: list[int] = []
    shares: list[float] = []
    combined: list[int] = []
    base_shares: list[float] = []
    combined_index: list[int] = []
    for number, request in enumerate(requests):
        first, end = starts[number], starts[number + 1]
        if request.is_base or first == end:
            continue
        for token in range(first if every_token[number] else end - 1, end):
            for stream, (adapter, share) in enumerate(request.shares.items(), start=1):
                tokens.append(token)
                streams.append(stream)
                adapters.append(adapter)
                shares.append(share)
                combined_index.append(len(combined))
            combined.append(token)
            base_shares.append(request.base_share)
    if not combined:
        return None

    def indices(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=device)

    def column(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=device)[:, None]

    return QRows(
        tokens=indices(tokens),
        streams=indices(streams),
        adapters=indices(adapters),
        shares=column(shares),
        combined=indices(combined),
        base_shares=column(base_shares),
        combined_index=indices(combined_index),
        in_order=tokens == list(range(starts[len(requests)])) and set(streams) == {1},
    )


class RowBuffers:
    """Rows of a step in which each request has one token, at addresses that stay: S rows for each, padding included."""

    def __init__(self, requests: int, streams: int, device: torch.device) -> None:
        combined_index = torch.arange(requests, device=device).repeat_interleave(streams)
        self.streams = streams
        self.combined_index = combined_index
        self.stream_numbers = torch.arange(1, 1 + streams, device=device).repeat(requests)
        self.adapters = torch.zeros(requests * streams, dtype=torch.long, device=device)
        self.shares = torch.zeros(requests * streams, 1, device=device)
        self.base_shares = torch.ones(requests, 1, device=device)

    def filled(self, requests: Sequence[RequestDials], padded: int) -> QRows:
        """Rows for `padded` tokens, of which the first belong to the requests."""
        adapters, shares = [0] * (padded * self.streams), [0.0] * (padded * self.streams)
        base_shares = [1.0] * padded
        for number, request in enumerate(requests):
            base_shares[number] = request.base_share
            for stream, (adapter, share) in enumerate(request.shares.items()):
                adapters[number * self.streams + stream] = adapter
                shares[number * self.streams + stream] = share
        rows = padded * self.streams
        self.adapters[:rows].copy_(torch.tensor(adapters), non_blocking=True)
        self.shares[:rows, 0].copy_(torch.tensor(shares), non_blocking=True)
        self.base_shares[:padded, 0].copy_(torch.tensor(base_shares), non_blocking=True)
        return QRows(
            tokens=self.combined_index[:rows],
            streams=self.stream_numbers[:rows],
            adapters=self.adapters[:rows],
            shares=self.shares[:rows],
            combined=self.combined_index[: rows : self.streams],
            base_shares=self.base_shares[:padded],
            combined_index=self.combined_index[:rows],
            in_order=self.streams == 1,
        )
