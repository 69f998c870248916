"""Logit-level ops, for callers that already hold logits over the whole vocabulary.

    log pi~ = log softmax((q + alpha_0 log softmax(b)) / alpha_tilde)
    v       = alpha_tilde lse((q + alpha_0 log softmax(b)) / alpha_tilde)

The base normaliser is constant over the vocabulary: it cancels in `log pi~`, and in `v` it is one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastqadapter.ops import checks
from fastqadapter.ops.backends import Implementation, choose, fused_implementations


def _scores_ref(q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float) -> Tensor:
    dtype = checks.accumulation_dtype(q_logits.dtype)
    return (q_logits.to(dtype) + alpha_0 * torch.log_softmax(base_logits.to(dtype), dim=-1)) / alpha_tilde


def residual_log_probs_ref(q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float) -> Tensor:
    """The definition: two log-softmaxes."""
    return torch.log_softmax(_scores_ref(q_logits, base_logits, alpha_0, alpha_tilde), dim=-1)


def residual_soft_value_ref(q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float) -> Tensor:
    """The definition: a log-softmax and a log-sum-exp."""
    return alpha_tilde * torch.logsumexp(_scores_ref(q_logits, base_logits, alpha_0, alpha_tilde), dim=-1)


def _scores(q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float) -> Tensor:
    """Scores without the base normaliser: one (N, V) tensor instead of two."""
    dtype = checks.accumulation_dtype(q_logits.dtype)
    return torch.add(q_logits.to(dtype), base_logits.to(dtype), alpha=alpha_0).div_(alpha_tilde)


def residual_log_probs_fwd(q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float) -> Tensor:
    """One log-softmax: the base normaliser cancels."""
    return torch.log_softmax(_scores(q_logits, base_logits, alpha_0, alpha_tilde), dim=-1)


def residual_soft_value_fwd(q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float) -> Tensor:
    """Two log-sum-exps: the base normaliser is one number a row."""
    base_lse = torch.logsumexp(base_logits.to(checks.accumulation_dtype(q_logits.dtype)), dim=-1)
    return (
        alpha_tilde * torch.logsumexp(_scores(q_logits, base_logits, alpha_0, alpha_tilde), dim=-1) - alpha_0 * base_lse
    )


def _log_probs_fused(*args: Any) -> Tensor:
    from fastqadapter.ops.fused.residual import residual_log_probs_fused

    return residual_log_probs_fused(*args)


def _soft_value_fused(*args: Any) -> Tensor:
    from fastqadapter.ops.fused.residual import residual_soft_value_fused

    return residual_soft_value_fused(*args)


LOG_PROBS = {
    **fused_implementations("residual_log_probs", _log_probs_fused),
    "torch": Implementation(residual_log_probs_fwd),
    "eager": Implementation(residual_log_probs_ref),
}
SOFT_VALUE = {
    **fused_implementations("residual_soft_value", _soft_value_fused),
    "torch": Implementation(residual_soft_value_fwd),
    "eager": Implementation(residual_soft_value_ref),
}


def residual_log_probs(
    q_logits: Tensor,  # (N, V)
    base_logits: Tensor,  # (N, V)
    *,
    alpha_0: float,
    alpha_tilde: float,
    backend: str = "auto",
) -> Tensor:  # (N, V)
    """Log-probabilities of the customised policy, `log softmax((q + alpha_0 log softmax(b)) / alpha_tilde)`.

    Args:
        q_logits: (..., V) residual Q-values; gets the gradient.
        base_logits: (..., V) logits of the frozen base, same shape, dtype and device.
        alpha_0: weight of the base policy, >= 0.
        alpha_tilde: temperature of the customised policy, > 0.
        backend: `auto`, `triton`, `cpu`, `torch` or `eager`.

    Returns:
        (..., V) float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that differ, a number outside its range.
    """
    args = _checked(q_logits, base_logits, alpha_0, alpha_tilde)
    return choose("residual_log_probs", LOG_PROBS, backend, *args)(*args)


def residual_soft_value(
    q_logits: Tensor,  # (N, V)
    base_logits: Tensor,  # (N, V)
    *,
    alpha_0: float,
    alpha_tilde: float,
    backend: str = "auto",
) -> Tensor:  # (N,)
    """Soft value `v = alpha_tilde lse((q + alpha_0 log softmax(b)) / alpha_tilde)`; arguments and errors as
    `residual_log_probs`; returns (...,) float32 (float64 for float64). A row with NaN or +inf has no finite value."""
    args = _checked(q_logits, base_logits, alpha_0, alpha_tilde)
    return choose("residual_soft_value", SOFT_VALUE, backend, *args)(*args)


def _checked(
    q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float
) -> tuple[Tensor, Tensor, float, float]:
    if q_logits.dim() < 1 or q_logits.shape[-1] == 0:
        raise ValueError(f"q_logits has shape {tuple(q_logits.shape)}; expected (..., V) with V >= 1")
    if q_logits.shape != base_logits.shape:
        raise ValueError(
            f"base_logits has shape {tuple(base_logits.shape)}, q_logits {tuple(q_logits.shape)}; expected the same"
        )
    if q_logits.dtype not in checks.FLOATS or q_logits.dtype != base_logits.dtype:
        raise ValueError(
            f"q_logits has dtype {q_logits.dtype}, base_logits {base_logits.dtype}; expected one floating dtype"
        )
    checks.check_device("base_logits", base_logits, q_logits, reference="q_logits")
    checks.check_frozen("base_logits", base_logits)
    checks.check_alphas(alpha_0, alpha_tilde)
    return q_logits, base_logits, alpha_0, alpha_tilde
