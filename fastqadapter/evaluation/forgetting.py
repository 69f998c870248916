"""Has the model forgotten: KL from the base and perplexity on neutral text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from fastqadapter.evaluation.scores import TokenScores
from fastqadapter.packing import PackedPairs, pack


@dataclasses.dataclass(frozen=True)
class Drift:
    """On neutral text, means over its tokens."""

    kl: float  # KL(pi || pi~), nats per token
    perplexity: float
    base_perplexity: float


def pack_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[PackedPairs]:
    """Each text from its first token on, cut into pieces of `max_length` tokens, one batch for each."""
    batches = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            if len(piece) > 1:
                batches.append(pack([(piece[:1], [piece[1:]])]))
    if not batches:
        raise ValueError("the neutral text has no two tokens: give some text")
    return batches


def drifts(scores: Sequence[TokenScores]) -> list[Drift]:
    """One for each point, over all texts."""
    base = torch.cat([each.base for each in scores]).double().mean()
    policy = torch.cat([each.policy for each in scores], dim=1).double().mean(dim=1)
    kl = torch.cat([each.kl for each in scores], dim=1).double().mean(dim=1)
    # exp of a tensor: infinite from 709 nats a token on, where math.exp raises.
    perplexities, base_perplexity = policy.neg().exp().tolist(), float(base.neg().exp())
    return [
        Drift(point_kl, perplexity, base_perplexity)
        for point_kl, perplexity in zip(kl.tolist(), perplexities, strict=True)
    ]
