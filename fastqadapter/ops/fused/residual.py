"""`residual_log_probs` and `residual_soft_value` on kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastqadapter.ops.fused import kernels_of


@torch.library.custom_op("fastqadapter::residual_soft_value", mutates_args=())
def residual_soft_value_op(
    backend: str, q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float
) -> tuple[Tensor, Tensor]:
    """v and, without gradient, the lse of the scores."""
    return kernels_of(backend).residual_soft_value(q_logits, base_logits, alpha_0, alpha_tilde)


@residual_soft_value_op.register_fake
def _(backend: str, q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float) -> tuple[Tensor, Tensor]:
    value = q_logits.new_empty(q_logits.shape[0], dtype=torch.float32)
    return value, torch.empty_like(value)


@torch.library.custom_op("fastqadapter::residual_soft_value_bwd", mutates_args=())
def residual_soft_value_bwd_op(
    backend: str,
    q_logits: Tensor,
    base_logits: Tensor,
    lse: Tensor,
    grad_value: Tensor,
    alpha_0: float,
    alpha_tilde: float,
) -> Tensor:
    return kernels_of(backend).residual_soft_value_bwd(q_logits, base_logits, lse, grad_value, alpha_0, alpha_tilde)


@residual_soft_value_bwd_op.register_fake
def _(
    backend: str,
    q_logits: Tensor,
    base_logits: Tensor,
    lse: Tensor,
    grad_value: Tensor,
    alpha_0: float,
    alpha_tilde: float,
) -> Tensor:
    return torch.empty_like(q_logits, memory_format=torch.contiguous_format)


def _keep_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend, q_logits, base_logits, ctx.alpha_0, ctx.alpha_tilde = inputs
    ctx.save_for_backward(q_logits, base_logits, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _soft_value_backward(ctx: Any, grad_value: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    alphas = ctx.alpha_0, ctx.alpha_tilde
    gradient = residual_soft_value_bwd_op(ctx.backend, *ctx.saved_tensors, grad_value.contiguous(), *alphas)
    return None, gradient, None, None, None


residual_soft_value_op.register_autograd(_soft_value_backward, setup_context=_keep_logits)


@torch.library.custom_op("fastqadapter::residual_log_probs", mutates_args=())
def residual_log_probs_op(
    backend: str, q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float
) -> Tensor:
    return kernels_of(backend).residual_log_probs(q_logits, base_logits, alpha_0, alpha_tilde)


@residual_log_probs_op.register_fake
def _(backend: str, q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float) -> Tensor:
    return q_logits.new_empty(q_logits.shape, dtype=torch.float32)


@torch.library.custom_op("fastqadapter::residual_log_probs_bwd", mutates_args=())
def residual_log_probs_bwd_op(
    backend: str, log_probs: Tensor, grad: Tensor, alpha_tilde: float, dtype: torch.dtype
) -> Tensor:
    return kernels_of(backend).residual_log_probs_bwd(log_probs, grad, alpha_tilde, dtype)


@residual_log_probs_bwd_op.register_fake
def _(backend: str, log_probs: Tensor, grad: Tensor, alpha_tilde: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(log_probs, dtype=dtype)


def _keep_log_probs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.backend, q_logits, *_, ctx.alpha_tilde = inputs
    ctx.dtype = q_logits.dtype


def _log_probs_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (log_probs,) = ctx.saved_tensors
    grad = _with_neighbouring_columns(grad)
    gradient = residual_log_probs_bwd_op(ctx.backend, log_probs, grad, ctx.alpha_tilde, ctx.dtype)
    return None, gradient, None, None, None


residual_log_probs_op.register_autograd(_log_probs_backward, setup_context=_keep_log_probs)


def _with_neighbouring_columns(logits: Tensor) -> Tensor:  # (..., V) -> (N, V)
    """As a matrix whose rows may lie anywhere; copied only where the columns of a row are not neighbours."""
    matrix = logits.reshape(-1, logits.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def residual_log_probs_fused(
    backend: str, q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float
) -> Tensor:
    rows = (_with_neighbouring_columns(logits) for logits in (q_logits, base_logits))
    return residual_log_probs_op(backend, *rows, float(alpha_0), float(alpha_tilde)).view(q_logits.shape)


def residual_soft_value_fused(
    backend: str, q_logits: Tensor, base_logits: Tensor, alpha_0: float, alpha_tilde: float
) -> Tensor:
    rows = (_with_neighbouring_columns(logits) for logits in (q_logits, base_logits))
    return residual_soft_value_op(backend, *rows, float(alpha_0), float(alpha_tilde))[0].view(q_logits.shape[:-1])
