"""Taken value: `q_t[a_t] = W[a_t] . d_t`, a gather and a dot product with fp32 accumulation, never a rounded logit.

A bf16 logit of size 16 to 32 is off by up to 0.0625; summed over a response that is the error of the whole reward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastqadapter.ops import checks
from fastqadapter.ops.backends import Implementation, choose, fused_implementations


def taken_value_ref(
    hidden_q: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    actions: Tensor,  # (N,)
) -> Tensor:  # (N,)
    """Gather, multiply, sum, in float32 (float64 for float64). An action outside the vocabulary gives NaN."""
    dtype = checks.accumulation_dtype(weight.dtype)
    inside = (actions >= 0) & (actions < weight.shape[0])
    rows = weight.index_select(0, actions.where(inside, 0)).to(dtype)
    return (hidden_q.to(dtype) * rows).sum(dim=-1).masked_fill(~inside, torch.nan)


def _fused(*args: Any) -> Tensor:
    from fastqadapter.ops.fused.soft_value import taken_value_fused

    return taken_value_fused(*args)


IMPLEMENTATIONS = {
    **fused_implementations("taken_value", _fused),
    "torch": Implementation(taken_value_ref),
    "eager": Implementation(taken_value_ref),
}


def taken_value(
    hidden_q: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    actions: Tensor,  # (N,)
    *,
    backend: str = "auto",
) -> Tensor:  # (N,)
    """Residual Q-value of the action taken in each state, `q[a] = W[a] . d`, without bias and logit scale.

    Args:
        hidden_q: (N, D) `d`, in the dtype of `weight` or float32; gets the gradient `g W[a]`.
        weight: (V, D) frozen LM head.
        actions: (N,) int64 or int32 tokens. A token outside the vocabulary raises on the CPU; on an accelerator, where
            looking would wait for the device, its value is NaN.
        backend: `auto`, `triton`, `cpu`, `torch` or `eager`.

    Returns:
        (N,) float32 (float64 for a float64 `weight`).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a trainable `weight`, an action outside the vocabulary.
    """
    checks.check_weight(weight)
    checks.check_hidden("hidden_q", hidden_q, weight)
    checks.check_actions(actions, hidden_q.shape[0], weight)
    run = choose("taken_value", IMPLEMENTATIONS, backend, hidden_q, weight, actions)
    return run(hidden_q, weight, actions)
