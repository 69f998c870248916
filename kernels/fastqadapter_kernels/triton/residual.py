"""Logit-level ops, for callers that hold logits (N, V): the customised policy, its soft value, and their gradients.

    c = (q + alpha_0 b) / alpha_tilde
    v        = alpha_tilde lse(c) - alpha_0 lse(b),    dv/dq = exp(c - lse(c))
    log pi~  = c - lse(c),                             dq = (g - exp(log pi~) sum_a g_a) / alpha_tilde

`v` and its gradient read each number once. `log pi~` and its gradient need a sum over the row before the first result.
Rows up to WHOLE stay in registers meanwhile. Longer ones do not fit (131072 scores in fp32 are 512
KiB, twice the registers of a multiprocessor) and are read a second time: from the L2 cache, as long as it holds the
rows of so many multiprocessors that they draw the bandwidth of the memory (on an H100 in bf16 up to V = 160000), else
from memory.

A score is computed several times, in the forward and in the backward kernel, and must have the same bits each time:
with scores of 1e5 (alpha_tilde = 0.05) one rounding more or less made the gradient wrong by 1.6% on an H200. So
products and sums are never fused here. All these kernels wait for memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqadapter_kernels.triton.device import Hardware, hardware, launch_options, on_its_device
from fastqadapter_kernels.triton.online import finite_shift, log_sum_exp, online_lanes
from fastqadapter_kernels.triton.soft_value import RowConfig

# Longest rows that are kept whole in registers: 32 scores a lane in 512 lanes. Twice as many spilled.
WHOLE = 16384

# The part of the multiprocessors that draws the whole bandwidth of the memory. A prediction: 512 lanes with four loads
# of 16 bytes under way are 32 KiB in 0.7 us, 47 GB/s each, 2.8 TB/s for 59 of an H100's 132.
ENOUGH_TO_DRAW = 0.45


def _normalised_config(hw: Hardware, vocab: int) -> RowConfig:
    """Where the result of a score needs the sum over the row: rows up to WHOLE in one tile."""
    if hw.arch == "interpreter":
        return RowConfig.rule(hw, vocab)
    if vocab > WHOLE:
        return RowConfig(8192, 8) if hw.is_hip else RowConfig(8192, 16)
    block_v = max(1024, triton.next_power_of_2(vocab))
    return RowConfig(block_v, max(4, block_v // 1024) // (2 if hw.is_hip else 1))


def _options(hw: Hardware, config: RowConfig) -> dict[str, int | bool]:
    return launch_options(hw, config.num_warps, fp_fusion=False)


def _rows_under_way(hw: Hardware, rows: int, row_bytes: int, one_tile: bool) -> int:
    """Programs of a launch: one a row, or as many as have their rows in three quarters of the cache."""
    in_cache = hw.cache_bytes * 3 // 4 // row_bytes
    if one_tile or in_cache < ENOUGH_TO_DRAW * hw.multiprocessors:
        return rows
    return min(rows, hw.multiprocessors, in_cache)


@triton.jit
def _load_scores(q_ptr, b_ptr, columns, v, alpha_0, alpha_tilde):
    """Scores c and base logits b; -inf outside."""
    inside = columns < v
    q = tl.load(q_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    b = tl.load(b_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return (q + alpha_0 * b) * (1.0 / alpha_tilde), tl.where(inside, b, float("-inf"))


@triton.jit
def _residual_soft_value_kernel(
    q_ptr, b_ptr,  # (n, v), (n, v)
    value_ptr, lse_ptr,  # (n,), (n,): v and lse(c)
    v, stride_q, stride_b, alpha_0, alpha_tilde,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    maximum_c = tl.full((), float("-inf"), tl.float32)
    maximum_b = tl.full((), float("-inf"), tl.float32)
    totals_c = tl.zeros((BLOCK_V,), tl.float32)
    totals_b = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, v, BLOCK_V):
        c, b = _load_scores(q_ptr + row * stride_q, b_ptr + row * stride_b, start + lanes, v, alpha_0, alpha_tilde)
        maximum_c, totals_c = online_lanes(maximum_c, totals_c, c)
        maximum_b, totals_b = online_lanes(maximum_b, totals_b, b)
    lse = log_sum_exp(maximum_c, tl.sum(totals_c, axis=0))
    base_lse = log_sum_exp(maximum_b, tl.sum(totals_b, axis=0))
    tl.store(lse_ptr + row, lse)
    tl.store(value_ptr + row, alpha_tilde * lse - alpha_0 * base_lse)


@triton.jit
def _residual_soft_value_bwd_kernel(
    q_ptr, b_ptr, lse_ptr, grad_ptr,  # (n, v), (n, v), (n,), (n,)
    grad_q_ptr,  # (n, v)
    v, stride_q, stride_b, alpha_0, alpha_tilde,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    c, _ = _load_scores(q_ptr + row * stride_q, b_ptr + row * stride_b, columns, v, alpha_0, alpha_tilde)
    grad_q = tl.load(grad_ptr + row) * tl.exp(c - tl.load(lse_ptr + row))
    tl.store(grad_q_ptr + row * v + columns, grad_q.to(grad_q_ptr.dtype.element_ty), mask=columns < v)


@triton.jit(do_not_specialize=["n"])  # the number of rows changes from call to call
def _residual_log_probs_kernel(
    q_ptr, b_ptr,  # (n, v), (n, v)
    out_ptr,  # (n, v) fp32
    n, v, stride_q, stride_b, alpha_0, alpha_tilde,
    ONE_TILE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK_V)
    for index in range(tl.program_id(0), n, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        q_row = q_ptr + row * stride_q
        b_row = b_ptr + row * stride_b
        out_row = out_ptr + row * v
        if ONE_TILE:
            c, _ = _load_scores(q_row, b_row, lanes, v, alpha_0, alpha_tilde)
            shift = finite_shift(tl.max(c, axis=0))
            log_probs = c - shift - tl.log(tl.sum(tl.exp(c - shift), axis=0))
            tl.store(out_row + lanes, log_probs, mask=lanes < v)
        else:
            maximum = tl.full((), float("-inf"), tl.float32)
            totals = tl.zeros((BLOCK_V,), tl.float32)
            for start in range(0, v, BLOCK_V):
                c, _ = _load_scores(q_row, b_row, start + lanes, v, alpha_0, alpha_tilde)
                maximum, totals = online_lanes(maximum, totals, c)
            shift = finite_shift(maximum)
            log_total = tl.log(tl.sum(totals, axis=0))
            for start in range(0, v, BLOCK_V):
                columns = start + lanes
                c, _ = _load_scores(q_row, b_row, columns, v, alpha_0, alpha_tilde)
                # The result is not read again: it must not push the next rows out of the cache.
                tl.store(out_row + columns, c - shift - log_total, mask=columns < v, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n"])  # the number of rows changes from call to call
def _residual_log_probs_bwd_kernel(
    log_probs_ptr, grad_ptr,  # (n, v), (n, v) fp32
    grad_q_ptr,  # (n, v)
    n, v, stride_grad, alpha_tilde,
    ONE_TILE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK_V)
    inverse_temperature = 1.0 / alpha_tilde
    for index in range(tl.program_id(0), n, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        grad_row = grad_ptr + row * stride_grad
        log_probs_row = log_probs_ptr + row * v
        grad_q_row = grad_q_ptr + row * v
        if ONE_TILE:
            grad = tl.load(grad_row + lanes, mask=lanes < v, other=0.0)
            log_probs = tl.load(log_probs_row + lanes, mask=lanes < v, other=0.0)
            grad_q = (grad - tl.exp(log_probs) * tl.sum(grad, axis=0)) * inverse_temperature
            tl.store(grad_q_row + lanes, grad_q.to(grad_q_ptr.dtype.element_ty), mask=lanes < v)
        else:
            sums = tl.zeros((BLOCK_V,), tl.float32)
            for start in range(0, v, BLOCK_V):
                columns = start + lanes
                sums += tl.load(grad_row + columns, mask=columns < v, other=0.0)
            total = tl.sum(sums, axis=0)
            for start in range(0, v, BLOCK_V):
                columns = start + lanes
                grad = tl.load(grad_row + columns, mask=columns < v, other=0.0)
                log_probs = tl.load(log_probs_row + columns, mask=columns < v, other=0.0, eviction_policy="evict_first")
                grad_q = (grad - tl.exp(log_probs) * total) * inverse_temperature
                tl.store(
                    grad_q_row + columns, grad_q.to(grad_q_ptr.dtype.element_ty), mask=columns < v,
                    eviction_policy="evict_first",
                )  # fmt: skip


@on_its_device
def residual_soft_value(
    q_logits: Tensor,  # (N, V), neighbouring columns
    base_logits: Tensor,  # (N, V), neighbouring columns
    alpha_0: float,
    alpha_tilde: float,
    *,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:  # v (N,), lse of the scores (N,), fp32
    rows, vocab = q_logits.shape
    hw = hardware(q_logits.device)
    config = config or RowConfig.rule(hw, vocab)
    value, lse = (q_logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    _residual_soft_value_kernel[(rows,)](
        q_logits, base_logits, value, lse,
        vocab, q_logits.stride(0), base_logits.stride(0), alpha_0, alpha_tilde,
        BLOCK_V=config.block_v, **_options(hw, config),
    )  # fmt: skip
    return value, lse


@on_its_device
def residual_soft_value_bwd(
    q_logits: Tensor,  # (N, V)
    base_logits: Tensor,  # (N, V)
    lse: Tensor,  # (N,)
    grad_value: Tensor,  # (N,)
    alpha_0: float,
    alpha_tilde: float,
    *,
    config: RowConfig | None = None,
) -> Tensor:  # (N, V), in the dtype of q_logits
    rows, vocab = q_logits.shape
    hw = hardware(q_logits.device)
    config = config or RowConfig.rule(hw, vocab)
    grad_q = torch.empty_like(q_logits, memory_format=torch.contiguous_format)
    _residual_soft_value_bwd_kernel[(rows, triton.cdiv(vocab, config.block_v))](
        q_logits, base_logits, lse, grad_value, grad_q,
        vocab, q_logits.stride(0), base_logits.stride(0), alpha_0, alpha_tilde,
        BLOCK_V=config.block_v, **_options(hw, config),
    )  # fmt: skip
    return grad_q


@on_its_device
def residual_log_probs(
    q_logits: Tensor,  # (N, V), neighbouring columns
    base_logits: Tensor,  # (N, V), neighbouring columns
    alpha_0: float,
    alpha_tilde: float,
    *,
    config: RowConfig | None = None,
) -> Tensor:  # (N, V) fp32
    rows, vocab = q_logits.shape
    hw = hardware(q_logits.device)
    config = config or _normalised_config(hw, vocab)
    one_tile = vocab <= config.block_v
    out = q_logits.new_empty((rows, vocab), dtype=torch.float32)
    row_bytes = 2 * vocab * q_logits.element_size()
    _residual_log_probs_kernel[(_rows_under_way(hw, rows, row_bytes, one_tile),)](
        q_logits, base_logits, out,
        rows, vocab, q_logits.stride(0), base_logits.stride(0), alpha_0, alpha_tilde,
        ONE_TILE=one_tile, BLOCK_V=config.block_v, **_options(hw, config),
    )  # fmt: skip
    return out


@on_its_device
def residual_log_probs_bwd(
    log_probs: Tensor,  # (N, V) fp32, contiguous
    grad: Tensor,  # (N, V) fp32, neighbouring columns
    alpha_tilde: float,
    dtype: torch.dtype,
    *,
    config: RowConfig | None = None,
) -> Tensor:  # (N, V) in `dtype`
    rows, vocab = log_probs.shape
    hw = hardware(log_probs.device)
    config = config or _normalised_config(hw, vocab)
    one_tile = vocab <= config.block_v
    grad_q = log_probs.new_empty((rows, vocab), dtype=dtype)
    row_bytes = vocab * grad.element_size()  # only the gradient is read twice
    _residual_log_probs_bwd_kernel[(_rows_under_way(hw, rows, row_bytes, one_tile),)](
        log_probs, grad, grad_q,
        rows, vocab, grad.stride(0), alpha_tilde,
        ONE_TILE=one_tile, BLOCK_V=config.block_v, **_options(hw, config),
    )  # fmt: skip
    return grad_q
