"""What the operators share: the name space, and the gradient that was computed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fastqadapter"


@torch.library.custom_op(f"{NAMESPACE}::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor * gradient` in `dtype`; a new tensor each time, so that backward may run twice."""
    return (factor * gradient).to(dtype)


@scale_gradient.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (factor * gradient).to(dtype)


def only_first(ctx: Any, output: tuple[Tensor, ...], differentiable: int = 1) -> None:
    """Mark all outputs but the first ones as without gradient."""
    ctx.mark_non_differentiable(*output[differentiable:])
