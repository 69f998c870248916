"""Taken values and the gradient of the hidden states, a gather each.

    q_t  = W[a_t] . d_{s_t}                                           M transitions
    dd_s = g_v[s] e_s + sum over the transitions t of s  g_q[t] W[a_t]     S states

The products of 16-bit numbers are exact in fp32, in which they are summed: a rounded logit of size 16 to 32 would be
off by 0.06. The transitions of a state come as a sorted list, so no two programs add to one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqadapter_kernels.triton.device import hardware, launch_options, on_its_device

BLOCK_D = 1024


def _options(device: torch.device) -> dict[str, int | bool]:
    """128 lanes with 8 numbers each: loads of 16 bytes."""
    hw = hardware(device)
    return launch_options(hw, 2 if hw.is_hip else 4)


@triton.jit(do_not_specialize=["s"])
def _taken_value_kernel(
    hidden_ptr, weight_ptr, states_ptr, actions_ptr,  # (s, d), (v, d), (m,), (m,)
    out_ptr,  # (m,)
    s, d, v, stride_hn, stride_hd, stride_wv, stride_wd,
    HAS_STATES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    transition = tl.program_id(0)
    action = tl.load(actions_ptr + transition).to(tl.int64)
    inside = (action >= 0) & (action < v)
    action = tl.where(inside, action, 0)
    if HAS_STATES:
        state = tl.load(states_ptr + transition).to(tl.int64)
    else:
        state = transition.to(tl.int64)
    inside = inside & (state >= 0) & (state < s)
    state = tl.where(inside, state, 0)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        h = tl.load(hidden_ptr + state * stride_hn + columns * stride_hd, mask=columns < d, other=0.0)
        w = tl.load(weight_ptr + action * stride_wv + columns * stride_wd, mask=columns < d, other=0.0)
        sums += h.to(tl.float32) * w.to(tl.float32)
    tl.store(out_ptr + transition, tl.where(inside, tl.sum(sums, axis=0), float("nan")))


@triton.jit
def _hidden_gradient_kernel(
    grad_value_ptr, expected_ptr, grad_taken_ptr, weight_ptr, actions_ptr,  # (s,), (s, d), (m,), (v, d), (m,)
    order_ptr, ends_ptr,  # (m,), (s + 1,): transitions of state s are order[ends[s]] to order[ends[s + 1]]
    out_ptr,  # (s, d)
    d, v, stride_wv, stride_wd,
    HAS_VALUE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    state = tl.program_id(0).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside_d = columns < d
    if HAS_VALUE:
        grad = tl.load(expected_ptr + state * d + columns, mask=inside_d, other=0.0) * tl.load(grad_value_ptr + state)
    else:
        grad = tl.zeros((BLOCK_D,), tl.float32)
    first = tl.load(ends_ptr + state)
    last = tl.load(ends_ptr + state + 1)
    for index in range(first, last):
        transition = tl.load(order_ptr + index)
        action = tl.load(actions_ptr + transition).to(tl.int64)
        inside = (action >= 0) & (action < v)
        row = weight_ptr + tl.where(inside, action, 0) * stride_wv
        w = tl.load(row + columns * stride_wd, mask=inside_d, other=0.0).to(tl.float32)
        # As in the torch form, the masked value of an illegal action is a constant: its gradient is 0.
        grad += tl.where(inside, tl.load(grad_taken_ptr + transition), 0.0) * w
    tl.store(out_ptr + state * d + columns, grad.to(out_ptr.dtype.element_ty), mask=inside_d)


@on_its_device
def taken_value(
    hidden: Tensor,  # (S, D)
    weight: Tensor,  # (V, D)
    actions: Tensor,  # (M,)
    states: Tensor | None = None,  # (M,) rows of hidden; None: row t for transition t
) -> Tensor:  # (M,) fp32; NaN for an action outside the vocabulary, or a state outside
    out = hidden.new_empty(actions.shape[0], dtype=torch.float32)
    size = hidden.shape[1]
    _taken_value_kernel[(actions.shape[0],)](
        hidden, weight, states, actions, out,
        hidden.shape[0], size, weight.shape[0], *hidden.stride(), *weight.stride(),
        HAS_STATES=states is not None, BLOCK_D=BLOCK_D, **_options(weight.device),
    )  # fmt: skip
    return out


@on_its_device
def hidden_gradient(
    grad_value: Tensor | None,  # (S,) fp32
    expected: Tensor | None,  # (S, D) fp32
    grad_taken: Tensor,  # (M,) fp32
    weight: Tensor,  # (V, D)
    actions: Tensor,  # (M,)
    order: Tensor,  # (M,)
    ends: Tensor,  # (S + 1,)
    dtype: torch.dtype,
) -> Tensor:  # (S, D) in `dtype`
    """`g_v[s] e_s + sum g_q[t] W[a_t]` in one launch; without `grad_value` and `expected` the sum alone."""
    states, size = ends.shape[0] - 1, weight.shape[1]
    out = weight.new_empty((states, size), dtype=dtype)
    _hidden_gradient_kernel[(states, triton.cdiv(size, BLOCK_D))](
        grad_value, expected, grad_taken, weight, actions, order, ends, out,
        size, weight.shape[0], *weight.stride(),
        HAS_VALUE=grad_value is not None, BLOCK_D=BLOCK_D, **_options(weight.device),
    )  # fmt: skip
    return out
