"""Gradients that the forward pass has computed: they have no derivative of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FirstDerivative(torch.autograd.Function):
    """The identity on `gradient`, as a function of what it depends on; without a derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("this op has no second derivative: use backend='eager', which has all of them")


def first_derivative(gradient: Tensor, *sources: Tensor) -> Tensor:
    """Mark a gradient formed in the forward pass as depending on `sources`.

    A backward pass with `create_graph=True` would else take it for a constant, and leave its share out of the second
    derivative without a word. Now a second derivative raises a RuntimeError.
    """
    return _FirstDerivative.apply(gradient, *sources) if torch.is_grad_enabled() else gradient
