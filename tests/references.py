"""Slow references, written from the definitions of the method alone; nothing of `fastqadapter` is used here.

Each takes the plain base model and the plain PEFT model and runs them by their own forwards, with ordinary caches:

* `separate`: two passes over right-padded rows;
* `prompt` and `shared`: one token at a time, the Q stream on the K/V that the mode prescribes.

The logits of both streams then go into `preference_loss`, the formulas over the whole vocabulary, row by row.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# The KV cache's name in forwards, outputs and generate; it changed with transformers 5.24.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

Model = Callable[..., Any]  # a causal LM of transformers, or PEFT's wrapper of one
KeysValues = list[tuple[Tensor, Tensor]]  # per layer, (1, Hkv, T, Dh) each
Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]  # token ids of prompt, chosen, rejected


@dataclasses.dataclass
class Branch:
    """Prompt and one response, and the logits of both streams at the states P-1 (last prompt token) to P+L-1."""

    prompt: Sequence[int]
    response: Sequence[int]
    base: Tensor  # (L + 1, V); row k is the state after k response tokens
    adapted: Tensor  # (L + 1, V)


class LentCache(DynamicCache):
    """A cache for one token: base K/V of the tokens before it, and whatever K/V it brings, the base's take their place.

    All layers keep everything; a sliding layer's window is the attention mask's business.
    """

    def __init__(self, lent: KeysValues):
        super().__init__()
        self.lent = lent
        for layer, (key, value) in enumerate(lent):
            super().update(key[:, :, :-1], value[:, :, :-1], layer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self.lent[layer_idx]
        assert key.shape[2] == self.layers[layer_idx].keys.shape[2] + key_states.shape[2]
        return super().update(key[:, :, -1:], value[:, :, -1:], layer_idx)


def keys_values(cache: DynamicCache, start: int = 0, stop: int | None = None) -> KeysValues:
    """K/V of some positions; layers grow by concatenation, so they stay what they are."""
    return [(layer.keys[:, :, start:stop], layer.values[:, :, start:stop]) for layer in cache.layers]


def filled_cache(content: KeysValues) -> DynamicCache:
    """An ordinary cache that already holds `content`."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(content):
        cache.update(key, value, layer)
    return cache


def last_logits(model: Model, ids: Sequence[int], cache: DynamicCache | None) -> Tensor:
    """(V,) logits after `ids`, given what is in the cache."""
    tokens = torch.tensor([list(ids)])
    return model(input_ids=tokens, **{CACHE_NAME: cache}, use_cache=cache is not None).logits[0, -1]


# --- logits of both streams at every state of a branch ---------------------------------------------------------------


def padded_branches(base: Model, adapted: Model, pairs: Sequence[Pair], pad: int = 0) -> list[Branch]:
    """`separate`: both models over all branches as right-padded rows, all chosen ones first."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for index, (prompt, response) in enumerate(rows):
        ids[index, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        mask[index, : len(prompt) + len(response)] = 1
    with torch.no_grad():
        base_logits = base(input_ids=ids, attention_mask=mask, use_cache=False).logits
    adapted_logits = adapted(input_ids=ids, attention_mask=mask, use_cache=False).logits
    branches = []
    for index, (prompt, response) in enumerate(rows):
        states = slice(len(prompt) - 1, len(prompt) + len(response))
        branches.append(Branch(prompt, response, base_logits[index, states], adapted_logits[index, states]))
    return [branch for pair in zip(branches[: len(pairs)], branches[len(pairs) :], strict=True) for branch in pair]


def stepwise_branches(base: Model, adapted: Model, pairs: Sequence[Pair], kv_mode: str) -> list[Branch]:
    """`prompt` and `shared`: each branch of each pair by itself, one token at a time."""
    return [
        stepwise_branch(base, adapted, prompt, response, kv_mode)
        for prompt, chosen, rejected in pairs
        for response in (chosen, rejected)
    ]


def stepwise_branch(
    base: Model, adapted: Model, prompt: Sequence[int], response: Sequence[int], kv_mode: str
) -> Branch:
    base_cache, own_cache = DynamicCache(), None
    base_logits, adapted_logits = [], []
    for position, token in enumerate([*prompt, *response]):
        with torch.no_grad():
            logits = last_logits(base, [token], base_cache)
        if position < len(prompt) - 1:
            continue
        base_logits.append(logits)
        if kv_mode == "shared":
            cache: DynamicCache = LentCache(keys_values(base_cache))
        else:
            own_cache = own_cache or filled_cache(keys_values(base_cache, stop=-1))
            cache = own_cache
        adapted_logits.append(last_logits(adapted, [token], cache))
    return Branch(prompt, response, torch.stack(base_logits), torch.stack(adapted_logits))


def branches_of(base: Model, adapted: Model, pairs: Sequence[Pair], kv_mode: str) -> list[Branch]:
    """Chosen and rejected branch of each pair, by the reference of the mode."""
    if kv_mode == "separate":
        return padded_branches(base, adapted, pairs)
    return stepwise_branches(base, adapted, pairs, kv_mode)


# --- the objective ---------------------------------------------------------------------------------------------------

# As in the table "Variants" of the method: Q head, first scored token, value in r_t, divisor, mean of r^2.
VARIANTS = {
    "default": SimpleNamespace(q_head="difference", shifted=False, value="next", divisor="eight", mean="pair"),
    "paper": SimpleNamespace(q_head="logits", shifted=False, value="next", divisor="one", mean="pair"),
    "reference": SimpleNamespace(q_head="logits", shifted=True, value="current", divisor="padded", mean="batch"),
}


@dataclasses.dataclass
class Weights:
    """The four numbers of the objective."""

    alpha_0: float = 1.0
    alpha_tilde: float = 1.0
    gamma: float = 1.0
    beta: float = 0.01


def rewards(branch: Branch, weights: Weights, variant: SimpleNamespace, width: int, pad: int = 0) -> Tensor:
    """r_t of the scored transitions of one branch; `width` is the length of the padded rows."""
    log_pi = torch.log_softmax(branch.base, dim=-1)
    q = branch.adapted - branch.base if variant.q_head == "difference" else branch.adapted
    values = weights.alpha_tilde * torch.logsumexp((q + weights.alpha_0 * log_pi) / weights.alpha_tilde, dim=-1)
    length = len(branch.response)
    steps = list(range(length))
    if variant.shifted:  # drops the first token; scores "last token -> pad" where the row has padding
        steps = steps[1:] + ([length] if len(branch.prompt) + length < width else [])
    actions = [*branch.response, pad]
    result = []
    for step in steps:
        if variant.value == "current":
            value = values[step]
        else:
            value = values[step + 1] if step + 1 < length else torch.zeros_like(values[0])
        result.append(q[step, actions[step]] - weights.gamma * value)
    return torch.stack(result) if result else q.new_zeros(0)


def preference_loss(
    branches: Sequence[Branch], weights: Weights, preset: str = "default", q_head: str | None = None
) -> Tensor:
    """Scalar loss; `branches` are chosen and rejected of each pair in turn. `q_head` replaces the preset's."""
    variant = copy.copy(VARIANTS[preset])
    variant.q_head = q_head or variant.q_head
    width = max(len(branch.prompt) + len(branch.response) for branch in branches)
    pairs = list(zip(branches[::2], branches[1::2], strict=True))
    each = [[rewards(branch, weights, variant, width) for branch in pair] for pair in pairs]
    mean_count = sum(len(chosen) + len(rejected) for chosen, rejected in each) / len(each)
    losses = []
    for chosen, rejected in each:
        divisor = {"eight": 8, "one": 1, "padded": width - 1}[variant.divisor]
        margin = (chosen.sum() - rejected.sum()) / divisor
        count = mean_count if variant.mean == "batch" else len(chosen) + len(rejected)
        squares = (chosen.square().sum() + rejected.square().sum()) / count
        losses.append(-F.logsigmoid(margin) + weights.beta * squares)
    return torch.stack(losses).mean()


# --- the customised policy -------------------------------------------------------------------------------------------


@torch.no_grad()
def policy_logits(
    base: Model,
    adapted: Sequence[tuple[float, Model]],  # weight and model of each adapter
    ids: Sequence[int],
    prompt_length: int,
    kv_mode: str,
    *,
    alpha_0: float = 1.0,
    alpha_tilde: float = 1.0,
    q_head: str = "difference",
) -> Tensor:
    """(V,) log-probabilities of the customised policy after `ids`, recomputed from scratch."""
    base_cache = DynamicCache()
    base_logits = last_logits(base, ids, base_cache)
    q = torch.zeros_like(base_logits)
    for weight, model in adapted:
        if kv_mode == "separate":
            logits = last_logits(model, ids, None)
        elif kv_mode == "shared":
            logits = last_logits(model, ids[-1:], LentCache(keys_values(base_cache)))
        else:
            cache = filled_cache(keys_values(base_cache, stop=prompt_length - 1))
            logits = last_logits(model, ids[prompt_length - 1 :], cache)
        q = q + weight * (logits - base_logits if q_head == "difference" else logits)
    return torch.log_softmax((q + alpha_0 * torch.log_softmax(base_logits, dim=-1)) / alpha_tilde, dim=-1)


def hand_policy(
    base: PreTrainedModel, next_log_probs: Callable[[list[int], int], Tensor], prompt_width: int
) -> PreTrainedModel:
    """A causal LM whose logits are `next_log_probs(ids, prompt_length)` for each row, its left padding cut off.

    Its `generate(..., use_cache=False)` is transformers' own search over these logits. `prompt_width` is the width of
    the batch of prompts.
    """

    def forward(
        input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [row[seen.bool()].tolist() for row, seen in zip(input_ids, mask, strict=True)]
        generated = input_ids.shape[1] - prompt_width
        logits = [next_log_probs(row, len(row) - generated) for row in rows]
        return CausalLMOutputWithPast(logits=torch.stack(logits)[:, None])

    hand = copy.deepcopy(base)
    hand.forward = forward
    return hand
