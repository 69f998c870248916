"""The Q-Adapter objective on a packed batch: states -> taken and soft values -> rewards -> preference loss, metrics.

The variants of the objective (presets) live here and only here: they choose which transitions are scored, which state
row gives the value of each, and what the sums are divided by. The ops below know nothing of them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastqadapter import ops
from fastqadapter.config import QAdapterConfig
from fastqadapter.ops.checks import accumulation_dtype
from fastqadapter.ops.preference_loss import Pairs, branch_sums
from fastqadapter.packing import PackedPairs


class NonFiniteLossError(RuntimeError):
    """A loss, a gradient or a weight became NaN or infinite; the message names the step, the rows and the last
    checkpoint."""


@dataclasses.dataclass(frozen=True)
class LMHead:
    """The frozen LM head: `logits = cap(logit_scale (W h + bias))`, where `cap(x) = softcap tanh(x / softcap)`."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    def scale_and_cap(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Products `W h` (..., any subset of V) and their biases -> logits."""
        logits = products if bias is None else products + bias
        logits = self.logit_scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclasses.dataclass(frozen=True)
class Transitions:
    """The scored transitions of a batch, branch after branch; M of them."""

    states: Tensor  # (M,) int64, state row s_t
    action_index: Tensor  # (M,) int64, index into the batch's actions
    pairs: Pairs


def pair_transitions(batch: PackedPairs, config: QAdapterConfig) -> Transitions:
    """Lay out the transitions that `config` scores, on the device of `batch`.

    Raises:
        ValueError: the batch does not hold pairs, or `scored_states="shifted"` meets a batch without `pad_action`.
    """
    _check_batch(batch, config)
    states: list[int] = []
    action_index: list[int] = []
    value_rows: list[int] = []
    branch_ends = [0]
    longest = max(prompt + max(responses) for prompt, *responses in batch.lengths)
    actions = 0
    for (prompt, *responses), group in zip(batch.lengths, batch.layout, strict=True):
        for branch, length in enumerate(responses):
            scored = _scored_steps(config, prompt, length, longest)
            rows = group.states_of(branch)
            states.extend(rows[step] for step in scored)
            action_index.extend(actions + step for step in scored)
            value_rows.extend(_value_row(config, rows, step) for step in scored)
            branch_ends.append(len(states))
            actions += length + (0 if batch.pad_action is None else 1)
    device = batch.input_ids.device
    counts = torch.tensor(branch_ends).diff().view(-1, 2).sum(dim=1).float()
    if config.regularizer == "batch":  # the mean over pairs of sum r^2 / (M / B) is sum r^2 / M
        counts = counts.mean().expand_as(counts)
    # A shifted mask may leave one-token responses without any step; their mean of r^2 is 0.
    squares_divisor = torch.where(counts == 0, 1.0, counts)

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    pairs = Pairs(
        value_rows=index(value_rows),
        branch_ends=index(branch_ends),
        divisor=_divisors(batch, config, longest).to(device, non_blocking=True),
        squares_divisor=squares_divisor.to(device, non_blocking=True),
    )
    return Transitions(index(states), index(action_index), pairs)


def _check_batch(batch: PackedPairs, config: QAdapterConfig) -> None:
    if any(len(lengths) != 3 for lengths in batch.lengths):
        raise ValueError("the preference loss needs two responses for each prompt: (prompt, chosen, rejected)")
    if config.scored_states == "shifted" and batch.pad_action is None:
        raise ValueError(
            "scored_states='shifted' (preset 'reference') also scores the step from the last token to padding: "
            "collate with PreferenceCollator(..., pad_action=tokenizer.pad_token_id)"
        )
    if config.scored_states == "response" and batch.pad_action is not None:
        raise ValueError("pad_action is for scored_states='shifted' alone: collate with pad_action=None")


def _scored_steps(config: QAdapterConfig, prompt: int, length: int, longest: int) -> range:
    """Steps i of one response that count; step i goes from its i-th state to its i-th token.

    The published mask is shifted by one: it drops the first response token, and scores the step from the last token
    to the padding wherever the row is padded, that is, shorter than the longest of the micro-batch.
    """
    if config.scored_states == "response":
        return range(length)
    return range(1, length + (1 if prompt + length < longest else 0))


def _value_row(config: QAdapterConfig, rows: list[int], step: int) -> int:
    """Row of the value in the reward of `step`: this state's or the next one's; -1 after the last."""
    if config.value_state == "current":
        return rows[step]
    return rows[step + 1] if step + 1 < len(rows) else -1


def _divisors(batch: PackedPairs, config: QAdapterConfig, longest: int) -> Tensor:
    if config.divisor == "max_length":
        return torch.tensor([float(max(responses)) for _, *responses in batch.lengths])
    if config.divisor == "padded_length":
        return torch.full((len(batch),), float(longest - 1))
    return torch.full((len(batch),), float(config.fixed_divisor or 1.0))


def q_adapter_loss(
    hidden_q: Tensor,  # (S, D), h_q
    hidden_b: Tensor,  # (S, D)
    head: LMHead,
    batch: PackedPairs,
    config: QAdapterConfig,
    *,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and per-pair metrics of a packed batch from the last hidden states of both streams at its state rows.

    The metrics are those of `ops.preference_loss`, and `logps/chosen`, `logps/rejected`: the log-probability of each
    response (its scored tokens) under the customised policy.
    """
    transitions = pair_transitions(batch, config)
    actions = batch.actions.index_select(0, transitions.action_index)
    difference = config.q_head == "difference"
    if difference and head.softcap is None:
        dtype = accumulation_dtype(head.weight.dtype)
        hidden_q = hidden_q.to(dtype) - hidden_b.to(dtype)
    else:
        hidden_q = hidden_q.to(head.weight.dtype)
    hidden_b = hidden_b.to(head.weight.dtype)  # autocast may have left it in another dtype

    params = ops.HeadParams(
        alpha_0=config.alpha_0,
        alpha_tilde=config.alpha_tilde,
        bias=head.bias,
        bias_q=None if difference and head.softcap is None else head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        difference=difference and head.softcap is not None,
    )
    # In half precision a known lse would cost accuracy: see `ops.soft_value`.
    is_exact = head.weight.dtype in (torch.float32, torch.float64)
    values, base_lse, q_products = ops.state_action_values(
        hidden_q,
        hidden_b,
        head.weight,
        params,
        transitions.states,
        actions,
        base_lse=batch.base.lse if batch.base is not None and is_exact else None,
        backend=backend,
    )
    with torch.no_grad():
        base_products = ops.taken_value(
            hidden_b.index_select(0, transitions.states), head.weight, actions, backend=backend
        )
    q_taken, base_taken = _taken(q_products, base_products, head, actions, difference)
    loss, metrics = ops.preference_loss(q_taken, values, transitions.pairs, config, backend=backend)
    with torch.no_grad():
        log_pi = base_taken - base_lse[transitions.states]
        log_policy = (q_taken + config.alpha_0 * log_pi - values[transitions.states]) / config.alpha_tilde
        log_probs = branch_sums(log_policy, transitions.pairs)
    metrics |= {"logps/chosen": log_probs[:, 0], "logps/rejected": log_probs[:, 1]}
    return loss, metrics


def _taken(
    q_products: Tensor,  # (M,)
    base_products: Tensor,  # (M,)
    head: LMHead,
    actions: Tensor,  # (M,)
    difference: bool,
) -> tuple[Tensor, Tensor]:  # (M,), (M,)
    """Q-value and base logit of the action taken in each transition, from its products with both states."""
    bias = None if head.bias is None else head.bias.index_select(0, actions)
    base_taken = head.scale_and_cap(base_products, bias)
    if head.softcap is None:
        return head.scale_and_cap(q_products, None if difference else bias), base_taken
    q_taken = head.scale_and_cap(q_products, bias) + 0.0 * q_products  # tanh would hide an infinity
    return (q_taken - base_taken if difference else q_taken), base_taken
