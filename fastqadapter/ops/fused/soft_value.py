"""`soft_value`, `taken_value` and `state_action_values` on kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastqadapter.ops.derivative import first_derivative
from fastqadapter.ops.fused import kernels_of
from fastqadapter.ops.soft_value import HeadParams


def _per_row(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastqadapter::soft_value", mutates_args=())
def soft_value_op(
    backend: str,
    hidden_q: Tensor,
    hidden_b: Tensor,
    weight: Tensor,
    bias_b: Tensor | None,
    bias_q: Tensor | None,
    base_lse: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    logit_scale: float,
    softcap: float | None,
    difference: bool,
) -> tuple[Tensor, Tensor]:
    """v and lse(b), without gradient and without logits."""
    return kernels_of(backend).soft_value_lse(
        hidden_q, hidden_b, weight, bias_b, bias_q, base_lse, alpha_0, alpha_tilde, logit_scale, softcap, difference
    )


@soft_value_op.register_fake
def _(backend: str, hidden_q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _per_row(hidden_q), _per_row(hidden_q)


@torch.library.custom_op("fastqadapter::soft_value_and_gradient", mutates_args=())
def soft_value_and_gradient_op(
    backend: str,
    hidden_q: Tensor,
    hidden_b: Tensor,
    weight: Tensor,
    bias_b: Tensor | None,
    bias_q: Tensor | None,
    base_lse: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    logit_scale: float,
    softcap: float | None,
    difference: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v, lse(b) and e = dv/dhidden_q."""
    return kernels_of(backend).soft_value_and_gradient(
        hidden_q, hidden_b, weight, bias_b, bias_q, base_lse, alpha_0, alpha_tilde, logit_scale, softcap, difference
    )


@soft_value_and_gradient_op.register_fake
def _(backend: str, hidden_q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _per_row(hidden_q), _per_row(hidden_q), hidden_q.new_empty(hidden_q.shape, dtype=torch.float32)


def _keep_expected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], output[2])
    ctx.mark_non_differentiable(*output[1:])


def _scale_expected(ctx: Any, grad_value: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    hidden_q, expected = ctx.saved_tensors
    gradient = (grad_value[:, None] * expected).to(hidden_q.dtype)
    return (None, first_derivative(gradient, hidden_q), *[None] * 10)


soft_value_and_gradient_op.register_autograd(_scale_expected, setup_context=_keep_expected)


def soft_value_fused(
    backend: str,
    hidden_q: Tensor,  # (N, D)
    hidden_b: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    params: HeadParams,
    base_lse: Tensor | None,  # (N,)
) -> tuple[Tensor, Tensor]:  # v (N,), base_lse (N,)
    """The form with the expected embedding where a gradient may be asked for, else the one without logits."""
    with_gradient = torch.is_grad_enabled() and hidden_q.requires_grad
    op = soft_value_and_gradient_op if with_gradient else soft_value_op
    return op(backend, *_tensors(hidden_q, hidden_b, weight, params, base_lse), *_numbers(params))[:2]


def _tensors(
    hidden_q: Tensor, hidden_b: Tensor, weight: Tensor, params: HeadParams, base_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Vectors contiguous; matrices as they are: their strides are arguments of the kernels."""
    bias_b, bias_q = (None if bias is None else bias.contiguous() for bias in (params.bias, params.bias_q))
    return hidden_q, hidden_b, weight, bias_b, bias_q, None if base_lse is None else base_lse.float().contiguous()


def _numbers(params: HeadParams) -> tuple[float, float, float, float | None, bool]:
    # An integer would be a new kernel for each value, and a wrong type for the operator.
    softcap = None if params.softcap is None else float(params.softcap)
    return float(params.alpha_0), float(params.alpha_tilde), float(params.logit_scale), softcap, params.difference


def transitions_of_states(states: Tensor, count: int) -> tuple[Tensor, Tensor]:  # (M,) -> order (M,), ends (S + 1,)
    """Sort transitions by state: those of state s are `order[ends[s]:ends[s + 1]]`, in their own order."""
    ordered, order = torch.sort(states, stable=True)
    rows = torch.arange(count + 1, device=states.device, dtype=states.dtype)
    return order, torch.searchsorted(ordered, rows)


@torch.library.custom_op("fastqadapter::state_action_values", mutates_args=())
def state_action_values_op(
    backend: str,
    hidden_q: Tensor,
    hidden_b: Tensor,
    weight: Tensor,
    bias_b: Tensor | None,
    bias_q: Tensor | None,
    base_lse: Tensor | None,
    alpha_0: float,
    alpha_tilde: float,
    logit_scale: float,
    softcap: float | None,
    difference: bool,
    states: Tensor,
    actions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v (S,), W[a] . hidden_q[s] (M,), and without gradient: lse(b) (S,), e (S, D), transitions by state."""
    kernels = kernels_of(backend)
    value, lse, expected = kernels.soft_value_and_gradient(
        hidden_q, hidden_b, weight, bias_b, bias_q, base_lse, alpha_0, alpha_tilde, logit_scale, softcap, difference
    )
    taken = kernels.taken_value(hidden_q, weight, actions, states)
    order, ends = transitions_of_states(states, hidden_q.shape[0])
    return value, taken, lse, expected, order, ends


@state_action_values_op.register_fake
def _(backend: str, hidden_q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    states = others[-2]
    ends = states.new_empty(hidden_q.shape[0] + 1, dtype=torch.int64)
    expected = hidden_q.new_empty(hidden_q.shape, dtype=torch.float32)
    taken = torch.empty_like(states, dtype=torch.float32)
    return _per_row(hidden_q), taken, _per_row(hidden_q), expected, torch.empty_like(states, dtype=torch.int64), ends


@torch.library.custom_op("fastqadapter::hidden_gradient", mutates_args=())
def hidden_gradient_op(
    backend: str,
    grad_value: Tensor | None,
    expected: Tensor | None,
    grad_taken: Tensor,
    weight: Tensor,
    actions: Tensor,
    order: Tensor,
    ends: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`g_v e + sum g_q W[a]` for each state."""
    return kernels_of(backend).hidden_gradient(grad_value, expected, grad_taken, weight, actions, order, ends, dtype)


@hidden_gradient_op.register_fake
def _(
    backend: str,
    grad_value: Tensor | None,
    expected: Tensor | None,
    grad_taken: Tensor,
    weight: Tensor,
    actions: Tensor,
    order: Tensor,
    ends: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return weight.new_empty((ends.shape[0] - 1, weight.shape[1]), dtype=dtype)


def _keep_transitions(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, expected, order, ends = output
    backend, hidden_q, _, weight, *_, actions = inputs
    ctx.backend = backend
    ctx.save_for_backward(hidden_q, expected, weight, actions, order, ends)
    ctx.mark_non_differentiable(*output[2:])


def _both_gradients(ctx: Any, grad_value: Tensor, grad_taken: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    hidden_q, expected, weight, actions, order, ends = ctx.saved_tensors
    grads = grad_value.contiguous(), expected, grad_taken.contiguous()
    gradient = hidden_gradient_op(ctx.backend, *grads, weight, actions, order, ends, hidden_q.dtype)
    return (None, first_derivative(gradient, hidden_q), *[None] * 12)


state_action_values_op.register_autograd(_both_gradients, setup_context=_keep_transitions)


def state_action_values_fused(
    backend: str,
    hidden_q: Tensor,  # (S, D)
    hidden_b: Tensor,  # (S, D)
    weight: Tensor,  # (V, D)
    params: HeadParams,
    states: Tensor,  # (M,)
    actions: Tensor,  # (M,)
    base_lse: Tensor | None,  # (S,)
) -> tuple[Tensor, Tensor, Tensor]:  # v (S,), base_lse (S,), q[a] (M,)
    """Both values with one gradient of the hidden states: one launch writes it, gather included."""
    tensors = _tensors(hidden_q, hidden_b, weight, params, base_lse)
    states, actions = states.contiguous(), actions.contiguous()
    if torch.is_grad_enabled() and hidden_q.requires_grad:
        value, taken, lse, *_ = state_action_values_op(backend, *tensors, *_numbers(params), states, actions)
        return value, lse, taken
    value, lse = soft_value_op(backend, *tensors, *_numbers(params))
    return value, lse, taken_value_op(backend, hidden_q, weight, actions, states)


@torch.library.custom_op("fastqadapter::taken_value", mutates_args=())
def taken_value_op(backend: str, hidden_q: Tensor, weight: Tensor, actions: Tensor, states: Tensor | None) -> Tensor:
    """`W[a_t] . hidden_q[s_t]`, or of row t where `states` is None."""
    return kernels_of(backend).taken_value(hidden_q, weight, actions, states)


@taken_value_op.register_fake
def _(backend: str, hidden_q: Tensor, weight: Tensor, actions: Tensor, states: Tensor | None) -> Tensor:
    return hidden_q.new_empty(actions.shape[0], dtype=torch.float32)


def _keep_actions(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.backend, hidden_q, weight, actions, states = inputs
    ctx.save_for_backward(weight, actions, states)
    ctx.rows, ctx.hidden_dtype = hidden_q.shape[0], hidden_q.dtype


def _scatter_embeddings(ctx: Any, grad_taken: Tensor) -> tuple[Tensor | None, ...]:
    weight, actions, states = ctx.saved_tensors
    if states is None:
        states = torch.arange(ctx.rows, device=actions.device)
    order, ends = transitions_of_states(states, ctx.rows)
    grads = None, None, grad_taken.contiguous()
    gradient = hidden_gradient_op(ctx.backend, *grads, weight, actions, order, ends, ctx.hidden_dtype)
    return None, gradient, None, None, None


taken_value_op.register_autograd(_scatter_embeddings, setup_context=_keep_actions)


def taken_value_fused(
    backend: str,
    hidden_q: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    actions: Tensor,  # (N,)
) -> Tensor:  # (N,)
    return taken_value_op(backend, hidden_q, weight, actions.contiguous(), None)
