"""Device functions shared by the kernels: the online log-sum-exp of one row, and the head's soft-cap.

A row of -inf alone keeps `maximum = -inf, total = 0`, so that its log-sum-exp is -inf; NaN and +inf end in `total`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite_shift(maximum):
    """What to subtract before exp: the maximum, or 0 where it is -inf, since -inf - (-inf) would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def tanh(x):
    """tanh to 3e-7, with the instructions that every target and the interpreter have. Below 1/4 it is the Taylor
    series: `1 - 2 / (e^2x + 1)` would lose the digits of a small x."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def head_logits(products, bias, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Products `W h` and bias -> logits `cap(logit_scale (W h + bias))`, in fp32."""
    logits = logit_scale * (products + bias)
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits * (1.0 / softcap))
    return logits


@triton.jit
def online_rows(maximum, total, scores):
    """Count a tile of scores (rows, columns) into the running (maximum, total) of each row."""
    raised = tl.maximum(maximum, tl.max(scores, axis=1))
    shift = finite_shift(raised)
    total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(scores - shift[:, None]), axis=1)
    return raised, total


@triton.jit
def online_lanes(maximum, totals, scores):
    """The same for a tile of one row: a scalar maximum, and a total for each lane, to be summed once at the end."""
    raised = tl.maximum(maximum, tl.max(scores, axis=0))
    shift = finite_shift(raised)
    totals = totals * tl.exp(maximum - shift) + tl.exp(scores - shift)
    return raised, totals


@triton.jit
def log_sum_exp(maximum, total):
    return finite_shift(maximum) + tl.log(total)
