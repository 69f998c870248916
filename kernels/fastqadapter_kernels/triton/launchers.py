"""The launchers of all ops, as `fastqadapter_kernels.cpu` has them of the native kernels."""

from fastqadapter_kernels.triton.preference_loss import preference_loss
from fastqadapter_kernels.triton.residual import (
    residual_log_probs,
    residual_log_probs_bwd,
    residual_soft_value,
    residual_soft_value_bwd,
)
from fastqadapter_kernels.triton.soft_value import soft_value_and_gradient
from fastqadapter_kernels.triton.soft_value_lse import soft_value_lse
from fastqadapter_kernels.triton.taken_value import hidden_gradient, taken_value

__all__ = [
    "hidden_gradient",
    "preference_loss",
    "residual_log_probs",
    "residual_log_probs_bwd",
    "residual_soft_value",
    "residual_soft_value_bwd",
    "soft_value_and_gradient",
    "soft_value_lse",
    "taken_value",
]
