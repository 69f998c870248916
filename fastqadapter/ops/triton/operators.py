"""What the operators share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

NAMESPACE = "fastqadapter"


def only_first(ctx: Any, output: tuple[Tensor, ...], differentiable: int = 1) -> None:
    """Mark all outputs but the first ones as without gradient."""
    ctx.mark_non_differentiable(*output[differentiable:])
