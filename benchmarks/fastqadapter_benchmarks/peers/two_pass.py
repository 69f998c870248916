"""The published Q-Adapter computation, written anew from its description: two padded passes, full logit tensors.

Each pair becomes two right-padded rows, the prompt repeated in both. The model runs twice over all tokens, adapters off
and on, and every formula is evaluated on (2B, T, V) logits in fp32, with s_t = tokens[0..t] and a_t = token t+1::

    log pi = log_softmax(base logits)                                      (2B, T, V)
    v(s_t) = alpha_tilde * logsumexp((Q + alpha_0 * log pi) / alpha_tilde) (2B, T)
    r_t    = Q(s_t, a_t) - gamma * v                                       (2B, T-1)
    loss   = mean -log sigmoid((sum r^chosen - sum r^rejected) / divisor) + beta * mean r^2

It is the yardstick of `test_step.py`, and an oracle for tests: it shares no code with `fastqadapter`.
`PUBLISHED` has the mask and the value state of the published code; the other variants are what we think is right.
The published code also asks the model for two cross-entropy losses it never uses. They are left out: a yardstick
should not be slower than its mathematics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

TokenTriple = tuple[Sequence[int], Sequence[int], Sequence[int]]  # token ids of prompt, chosen, rejected


@dataclass(frozen=True)
class Variant:
    """What the variants of the objective differ in; values as in `fastqadapter.QAdapterConfig`."""

    q_head: Literal["logits", "difference"]  # Q is the adapted model's logits, or these minus the base logits
    scored_states: Literal["response", "shifted"]  # t = P-1..L-2, or as published: t = P..min(L-1, T-2)
    value_state: Literal["next", "current"]  # r_t uses v(s_{t+1}), 0 once the response has ended, or v(s_t)
    divisor: Literal["8", "padded_length", "1"]  # a number, or T-1
    regularizer: Literal["pair", "batch"]  # mean of r^2 over each pair, then over pairs; or over all scored states


PUBLISHED = Variant("logits", "shifted", "current", "padded_length", "batch")
VARIANTS = {
    "reference": PUBLISHED,
    "paper": Variant("logits", "response", "next", "1", "pair"),
    "default": Variant("difference", "response", "next", "8", "pair"),
}


class PaddedPairs(NamedTuple):
    """B pairs as 2B right-padded rows: all chosen branches, then all rejected ones."""

    input_ids: Tensor  # (2B, T) int64
    attention_mask: Tensor  # (2B, T) int64, 1 on prompt and response
    response_mask: Tensor  # (2B, T) bool, True on response tokens


def pad_pairs(token_triples: Sequence[TokenTriple], pad_id: int) -> PaddedPairs:
    """Lay out `(prompt, chosen, rejected)` token ids as padded rows; T is the longest prompt + response."""
    rows = [(prompt, chosen) for prompt, chosen, _ in token_triples]
    rows += [(prompt, rejected) for prompt, _, rejected in token_triples]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    response_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        input_ids[i, :length] = torch.tensor([*prompt, *response])
        attention_mask[i, :length] = 1
        response_mask[i, len(prompt) : length] = True
    return PaddedPairs(input_ids, attention_mask, response_mask)


def base_logits(model: PeftModel, batch: PaddedPairs, *, no_grad: bool = False) -> Tensor:
    """(2B, T, V) logits of the frozen model, at least fp32.

    The published code runs this pass with autograd on and detaches its result. That costs memory when something makes
    the inputs require grad (gradient checkpointing does), and nothing otherwise. `no_grad=True` is the fair version.
    """
    with torch.no_grad() if no_grad else contextlib.nullcontext(), model.disable_adapter():
        return _logits(model, batch)


def adapted_logits(model: PeftModel, batch: PaddedPairs) -> Tensor:
    """(2B, T, V) logits of the model with its adapter on, at least fp32."""
    return _logits(model, batch)


def scored_states(batch: PaddedPairs, variant: Variant) -> Tensor:
    """(2B, T-1) bool: the states whose reward counts."""
    return batch.response_mask[:, 1:] if variant.scored_states == "response" else batch.response_mask[:, :-1]


def token_rewards(
    q: Tensor,  # (2B, T, V) Q-values
    log_pi: Tensor,  # (2B, T, V)
    batch: PaddedPairs,
    *,
    alpha_0: float,
    alpha_tilde: float,
    gamma: float,
    variant: Variant = PUBLISHED,
) -> Tensor:
    """(2B, T-1) rewards r_t of every transition, scored or not."""
    values = alpha_tilde * torch.logsumexp((q + alpha_0 * log_pi) / alpha_tilde, dim=-1)  # (2B, T)
    q_taken = q[:, :-1].gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)  # (2B, T-1)
    if variant.value_state == "current":
        return q_taken - gamma * values[:, :-1]
    # s_{t+1} is terminal, with value 0, when the last token is in it: when there is no token t+2.
    alive = F.pad(batch.attention_mask[:, 2:], (0, 1)).bool()
    return q_taken - gamma * values[:, 1:].masked_fill(~alive, 0.0)


def preference_margins(
    rewards: Tensor,  # (2B, T-1)
    batch: PaddedPairs,
    variant: Variant = PUBLISHED,
) -> Tensor:
    """(B,) divided difference of the summed rewards; positive where the chosen branch wins."""
    chosen, rejected = (rewards * scored_states(batch, variant)).sum(-1).chunk(2)
    divisor = rewards.shape[1] if variant.divisor == "padded_length" else float(variant.divisor)
    return (chosen - rejected) / divisor


def reward_penalty(
    rewards: Tensor,  # (2B, T-1)
    batch: PaddedPairs,
    variant: Variant = PUBLISHED,
) -> Tensor:
    """Scalar mean of r^2 over the scored states."""
    scored = scored_states(batch, variant)
    squares = (rewards.square() * scored).sum(-1)  # (2B,)
    counts = scored.sum(-1)
    if variant.regularizer == "batch":
        return squares.sum() / counts.sum()
    return (torch.add(*squares.chunk(2)) / torch.add(*counts.chunk(2))).mean()


def two_pass_loss(
    model: PeftModel,
    batch: PaddedPairs,
    *,
    alpha_0: float,
    alpha_tilde: float,
    gamma: float,
    beta: float,
    variant: Variant = PUBLISHED,
    base_no_grad: bool = False,
) -> Tensor:
    """Scalar loss of a micro-batch, with the graph of the adapted pass behind it.

    Args:
        model: any PEFT causal LM; a logit soft-cap or scale is its own business, only its logits are used.
        batch: from `pad_pairs`.
        variant: `PUBLISHED`, or one of `VARIANTS`.
        base_no_grad: see `base_logits`.
    """
    logits = base_logits(model, batch, no_grad=base_no_grad)
    log_pi = torch.log_softmax(logits, dim=-1).detach()
    offset = logits.detach() if variant.q_head == "difference" else None
    del logits
    q = adapted_logits(model, batch)
    if offset is not None:
        q = q - offset
    rewards = token_rewards(q, log_pi, batch, alpha_0=alpha_0, alpha_tilde=alpha_tilde, gamma=gamma, variant=variant)
    preference = -F.logsigmoid(preference_margins(rewards, batch, variant)).mean()
    return preference + beta * reward_penalty(rewards, batch, variant)


def _logits(model: PeftModel, batch: PaddedPairs) -> Tensor:
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
