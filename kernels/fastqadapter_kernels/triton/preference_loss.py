"""Preference loss of a batch of pairs, its metrics and its gradients with respect to both inputs, in one launch.

    r_t    = q_t[a_t] - gamma v(row of the value), 0 for the terminal state
    margin = (sum_t r_t^chosen - sum_t r_t^rejected) / divisor
    loss   = mean over pairs of  -log sigmoid(margin) + beta sum_t r_t^2 / squares_divisor

One program a pair walks over its transitions twice: for the sums, then for the gradients. The last program to finish
adds the losses up, in the order of the pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqadapter_kernels.preference_metrics import METRICS
from fastqadapter_kernels.triton.device import hardware, launch_options, on_its_device

BLOCK_M = 512  # 1024 spills on sm_90


@triton.jit
def _rewards(q_taken_ptr, values_ptr, value_rows_ptr, t, mask, s, gamma):
    """Rewards and taken values of the transitions t, and their value rows (-1: terminal); NaN for a row outside."""
    q = tl.load(q_taken_ptr + t, mask=mask, other=0.0)
    row = tl.load(value_rows_ptr + t, mask=mask, other=-1).to(tl.int64)
    value = tl.load(values_ptr + row, mask=(row >= 0) & (row < s), other=float("nan"))
    return tl.where(row >= 0, q - gamma * value, q), q, row


@triton.jit
def _branch_sums(q_taken_ptr, values_ptr, value_rows_ptr, first, last, s, gamma, BLOCK_M: tl.constexpr):
    """Sums of r, r^2 and q over one branch."""
    rewards = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    q_values = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, last, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        r, q, _ = _rewards(q_taken_ptr, values_ptr, value_rows_ptr, t, t < last, s, gamma)
        rewards += r
        squares += r * r
        q_values += q
    return tl.sum(rewards, axis=0), tl.sum(squares, axis=0), tl.sum(q_values, axis=0)


@triton.jit
def _branch_gradients(
    q_taken_ptr, values_ptr, value_rows_ptr, grad_q_ptr, grad_values_ptr,
    first, last, s, gamma, slope, weight_of_square,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of one branch: slope + 2 r weight_of_square for a reward, -gamma times that for its value.

    A row of values is that of two transitions at most in every preset (the prompt's last token starts both branches),
    and a sum of two does not depend on the order: the atomic additions give the same bits in every run.
    """
    for start in range(first, last, BLOCK_M):
        t = start + tl.arange(0, BLOCK_M)
        r, _, row = _rewards(q_taken_ptr, values_ptr, value_rows_ptr, t, t < last, s, gamma)
        grad = slope + 2.0 * weight_of_square * r
        tl.store(grad_q_ptr + t, grad, mask=t < last)
        tl.atomic_add(grad_values_ptr + row, -gamma * grad, mask=(t < last) & (row >= 0) & (row < s), sem="relaxed")


@triton.jit
def _softplus(x):
    """log(1 + e^x). The quotient takes back what rounding did to 1 + e (Goldberg 1991, theorem 4)."""
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    log1p = tl.where(rounded == 1.0, e, e * (tl.log(rounded) / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit(do_not_specialize=["pairs", "m", "s"])  # what changes from batch to batch
def _preference_loss_kernel(
    q_taken_ptr, values_ptr, value_rows_ptr,  # (m,), (s,), (m,)
    branch_ends_ptr, divisor_ptr, squares_divisor_ptr,  # (2b + 1,), (b,), (b,)
    loss_ptr, metrics_ptr, grad_q_ptr, grad_values_ptr, losses_ptr, finished_ptr,  # (), (8, b), (m,), (s,), (b,), ()
    pairs, m, s, gamma, beta,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    first = tl.load(branch_ends_ptr + 2 * pair)
    middle = tl.load(branch_ends_ptr + 2 * pair + 1)
    last = tl.load(branch_ends_ptr + 2 * pair + 2)
    # Ends that do not rise from 0 to m are the caller's error: no memory but its own is touched, and the loss is NaN.
    legal = (first >= 0) & (first <= middle) & (middle <= last) & (last <= m)
    first = tl.where(legal, first, 0)
    middle = tl.where(legal, middle, 0)
    last = tl.where(legal, last, 0)
    divisor = tl.load(divisor_ptr + pair).to(tl.float32)
    squares_divisor = tl.load(squares_divisor_ptr + pair).to(tl.float32)
    chosen, chosen_squares, chosen_q = _branch_sums(
        q_taken_ptr, values_ptr, value_rows_ptr, first, middle, s, gamma, BLOCK_M
    )
    rejected, rejected_squares, rejected_q = _branch_sums(
        q_taken_ptr, values_ptr, value_rows_ptr, middle, last, s, gamma, BLOCK_M
    )
    margin = (chosen - rejected) / divisor
    # An infinite reward must not hide: -log sigmoid(inf) is 0, a wrong finite number, and 0 * inf is NaN.
    preference = _softplus(-margin) + 0.0 * (chosen + rejected)
    squares = (chosen_squares + rejected_squares) / squares_divisor
    loss = tl.where(legal, preference + beta * squares, float("nan"))

    slope = -1.0 / ((1.0 + tl.exp(margin)) * divisor * pairs)
    weight_of_square = beta / (squares_divisor * pairs)
    _branch_gradients(
        q_taken_ptr, values_ptr, value_rows_ptr, grad_q_ptr, grad_values_ptr,
        first, middle, s, gamma, slope, weight_of_square, BLOCK_M,
    )  # fmt: skip
    _branch_gradients(
        q_taken_ptr, values_ptr, value_rows_ptr, grad_q_ptr, grad_values_ptr,
        middle, last, s, gamma, -slope, weight_of_square, BLOCK_M,
    )  # fmt: skip

    out = metrics_ptr + pair
    count = tl.maximum(last - first, 1).to(tl.float32)
    accuracy = tl.where(margin > 0, 1.0, tl.where(margin == 0, 0.5, 0.0))
    tl.store(out, preference)
    tl.store(out + pairs, squares)
    tl.store(out + 2 * pairs, chosen / divisor)
    tl.store(out + 3 * pairs, rejected / divisor)
    tl.store(out + 4 * pairs, margin)
    tl.store(out + 5 * pairs, accuracy)
    tl.store(out + 6 * pairs, (chosen_q + rejected_q) / count)
    tl.store(out + 7 * pairs, (chosen_q + rejected_q - chosen - rejected) / count)
    tl.store(losses_ptr + pair, loss)

    tl.debug_barrier()  # the loss of this pair is written before the ticket is drawn
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == pairs - 1:
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, pairs, BLOCK_M):
            p = start + tl.arange(0, BLOCK_M)
            sums += tl.load(losses_ptr + p, mask=p < pairs, other=0.0, cache_modifier=".cg")
        tl.store(loss_ptr, tl.sum(sums, axis=0) / pairs)


@on_its_device
def preference_loss(
    q_taken: Tensor,  # (M,) fp32
    values: Tensor,  # (S,) fp32
    value_rows: Tensor,  # (M,) int64 or int32
    branch_ends: Tensor,  # (2B + 1,) int64 or int32
    divisor: Tensor,  # (B,)
    squares_divisor: Tensor,  # (B,)
    gamma: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss (), metrics (8, B), dloss/dq_taken (M,), dloss/dvalues (S,)
    """Loss, metrics in the order of METRICS, and gradients; all tensors contiguous."""
    pairs = divisor.shape[0]
    loss, losses, metrics = q_taken.new_empty(()), q_taken.new_empty(pairs), q_taken.new_empty((len(METRICS), pairs))
    grad_q, grad_values = torch.zeros_like(q_taken), torch.zeros_like(values)
    finished = torch.zeros((), dtype=torch.int32, device=q_taken.device)
    _preference_loss_kernel[(pairs,)](
        q_taken, values, value_rows, branch_ends, divisor, squares_divisor,
        loss, metrics, grad_q, grad_values, losses, finished,
        pairs, q_taken.shape[0], values.shape[0], gamma, beta,
        BLOCK_M=BLOCK_M, **launch_options(hardware(q_taken.device), 4),
    )  # fmt: skip
    return loss, metrics, grad_q, grad_values
