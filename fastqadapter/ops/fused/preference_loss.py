"""`preference_loss` on a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastqadapter.ops.derivative import first_derivative
from fastqadapter.ops.fused import kernels_of
from fastqadapter_kernels.preference_metrics import METRICS

if TYPE_CHECKING:
    from fastqadapter.ops.preference_loss import Pairs


@torch.library.custom_op("fastqadapter::preference_loss", mutates_args=())
def preference_loss_op(
    backend: str,
    q_taken: Tensor,
    values: Tensor,
    value_rows: Tensor,
    branch_ends: Tensor,
    divisor: Tensor,
    squares_divisor: Tensor,
    gamma: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, then without gradient: metrics (8, B), and the gradients with respect to q_taken and values."""
    return kernels_of(backend).preference_loss(
        q_taken, values, value_rows, branch_ends, divisor, squares_divisor, gamma, beta
    )


@preference_loss_op.register_fake
def _(backend: str, q_taken: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = others[2].shape[0]
    metrics = q_taken.new_empty((len(METRICS), pairs))
    return q_taken.new_empty(()), metrics, torch.empty_like(q_taken), torch.empty_like(values)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:3], *output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _scale_gradients(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q_taken, values, *gradients = ctx.saved_tensors
    marked = (first_derivative(grad_loss * gradient, q_taken, values) for gradient in gradients)
    return None, *marked, *[None] * 6


preference_loss_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def preference_loss_fused(
    backend: str,
    q_taken: Tensor,  # (M,)
    values: Tensor,  # (S,)
    pairs: Pairs,
    gamma: float,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    tensors = (q_taken, values, pairs.value_rows, pairs.branch_ends, pairs.divisor, pairs.squares_divisor)
    loss, metrics, *_ = preference_loss_op(
        backend, *(tensor.contiguous() for tensor in tensors), float(gamma), float(beta)
    )
    return loss, dict(zip(METRICS, metrics.unbind(), strict=True))
