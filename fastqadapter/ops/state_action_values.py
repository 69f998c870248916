"""Soft values of states and taken values of transitions together: what a loss needs of a batch, with one gradient.

    v_s = alpha_tilde lse((q_s + alpha_0 log softmax(b_s)) / alpha_tilde)                 S states
    x_t = W[a_t] . d_{s_t}                                                                M transitions
    dd_s = g_v[s] e_s + sum over the transitions t of s  g_x[t] W[a_t]

The same as `soft_value(d)` and `taken_value(d[states])`, whose gradients autograd would form, scatter and add apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastqadapter.ops import checks
from fastqadapter.ops.backends import Implementation, choose, fused_implementations, other_differentiation
from fastqadapter.ops.soft_value import HeadParams, check_states, soft_value_ref, soft_value_tiled
from fastqadapter.ops.taken_value import taken_value_ref

Values = tuple[Tensor, Tensor, Tensor]  # v (S,), base_lse (S,), x (M,)


def state_action_values_ref(
    hidden_q: Tensor,  # (S, D)
    hidden_b: Tensor,  # (S, D)
    weight: Tensor,  # (V, D)
    params: HeadParams,
    states: Tensor,  # (M,)
    actions: Tensor,  # (M,)
    base_lse: Tensor | None,  # (S,)
) -> Values:
    """The two definitions, one after the other."""
    value, base_lse = soft_value_ref(hidden_q, hidden_b, weight, params, base_lse)
    return value, base_lse, taken_value_ref(hidden_q.index_select(0, states), weight, actions)


def state_action_values_tiled(
    hidden_q: Tensor,  # (S, D)
    hidden_b: Tensor,  # (S, D)
    weight: Tensor,  # (V, D)
    params: HeadParams,
    states: Tensor,  # (M,)
    actions: Tensor,  # (M,)
    base_lse: Tensor | None,  # (S,)
) -> Values:
    """With the soft value tile by tile."""
    value, base_lse = soft_value_tiled(hidden_q, hidden_b, weight, params, base_lse)
    return value, base_lse, taken_value_ref(hidden_q.index_select(0, states), weight, actions)


def _fused(*args: Any) -> Values:
    from fastqadapter.ops.fused.soft_value import state_action_values_fused

    return state_action_values_fused(*args)


IMPLEMENTATIONS = {
    **fused_implementations("state_action_values", _fused),
    "torch": Implementation(state_action_values_tiled, other_differentiation),
    "eager": Implementation(state_action_values_ref),
}


def state_action_values(
    hidden_q: Tensor,  # (S, D)
    hidden_b: Tensor,  # (S, D)
    weight: Tensor,  # (V, D)
    params: HeadParams,
    states: Tensor,  # (M,)
    actions: Tensor,  # (M,)
    *,
    base_lse: Tensor | None = None,  # (S,)
    backend: str = "auto",
) -> Values:
    """Soft value and lse of the base logits of each state, and the product `W[a] . d` of each transition.

    Args:
        hidden_q: (S, D) `d`, or `h_q` under a soft-cap; the only argument that gets a gradient.
        hidden_b: (S, D) last hidden states of the frozen base.
        weight: (V, D) frozen LM head.
        params: alphas and head options, see `soft_value`.
        states: (M,) int64 or int32, the row of each transition; a row may have any number of transitions. One outside
            raises on the CPU, as an action does.
        actions: (M,) int64 or int32, the token that each transition takes, see `taken_value`.
        base_lse: (S,) lse of the base logits, if known; see `soft_value` for what it saves, and costs.
        backend: `auto`, `triton`, `cpu`, `torch` or `eager`.

    Returns:
        v (S,), lse of the base logits (S,), products (M,) without bias, logit scale and soft-cap; all float32
        (float64 for a float64 `weight`).

    Raises:
        ValueError: as `soft_value` and `taken_value`; no state.
    """
    check_states(hidden_q, hidden_b, weight, params)
    if base_lse is not None:
        checks.check_vector("base_lse", base_lse, hidden_q.shape[0], weight, "S")
    if hidden_q.shape[0] == 0:
        raise ValueError("hidden_q has 0 rows; expected at least one state")
    if states.dtype not in (torch.int64, torch.int32) or states.dim() != 1:
        raise ValueError(f"states is {states.dtype} {tuple(states.shape)}; expected (M,) int64 or int32")
    checks.check_device("states", states, weight)
    checks.check_index("state", states, hidden_q.shape[0], "the rows of hidden_q")
    checks.check_actions(actions, states.shape[0], weight, "M")
    args = (hidden_q, hidden_b, weight, params, states, actions, base_lse)
    return choose("state_action_values", IMPLEMENTATIONS, backend, *args)(*args)
