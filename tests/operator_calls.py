"""One call or more of every operator of the backends with kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backend_cases import device_of, move
from fastqadapter import ops
from fastqadapter.ops.fused import preference_loss, residual, soft_value
from soft_value_problem import Problem, problem

NUMBERS = ("alpha_0", "alpha_tilde", "logit_scale", "softcap", "difference")


def head_arguments(case: Problem, base_lse: Tensor | None = None) -> tuple[Any, ...]:
    """As the launchers of `soft_value` take them, with and without gradient."""
    params = ops.HeadParams(**case.options)
    numbers = [getattr(params, name) for name in NUMBERS]
    return case.hidden_q, case.hidden_b, case.weight, params.bias, params.bias_q, base_lse, *numbers


def two_pairs(backend: str) -> tuple[Tensor, ...]:
    """value_rows, branch_ends, divisor, squares_divisor."""
    ends = torch.tensor([0, 2, 3, 4, 6])
    return tuple(move(backend, torch.tensor([1, -1, -1, -1, 3, -1]), ends, torch.ones(2), torch.ones(2)))


def operator_calls(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Operator and arguments, by a name for the test."""
    device = device_of(backend)
    head = head_arguments(problem("softcap of all", dtype=torch.float32).to(device))
    q, b, w = head[:3]
    states, actions = torch.tensor([0, 0, 3, 4], device=device), torch.tensor([1, 2, 3, 36], device=device)
    order, ends = soft_value.transitions_of_states(states, 5)
    logits, other = q @ w.T, b @ w.T
    per_row, per_transition = torch.randn(5, device=device), torch.randn(4, device=device)
    trained = q.clone().requires_grad_()
    transposed = trained.detach().T.contiguous().T.requires_grad_()
    trained_logits = logits.clone().requires_grad_()
    taken = torch.randn(6, device=device, requires_grad=True)
    values = torch.randn(4, device=device, requires_grad=True)
    lse = torch.full((5,), 4.0, device=device)
    plain = (*head[:5], lse, 0.7, 1.3, 1.0, None, False)
    row_by_row = torch.zeros(5, dtype=torch.int64, device=device)
    forward, both = soft_value.soft_value_op, soft_value.soft_value_and_gradient_op
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "soft_value": (forward, head),
        "soft_value, cached": (forward, plain),
        "soft_value_and_gradient": (both, (trained, *head[1:])),
        "soft_value_and_gradient, cached": (both, (trained, *plain[1:])),
        "soft_value_and_gradient, transposed": (both, (transposed, *head[1:])),
        "state_action_values": (soft_value.state_action_values_op, (trained, *head[1:], states, actions)),
        "taken_value": (soft_value.taken_value_op, (trained, w, actions, states)),
        "taken_value, row by row": (soft_value.taken_value_op, (trained, w, row_by_row, None)),
        "hidden_gradient": (
            soft_value.hidden_gradient_op,
            (per_row, q, per_transition, w, actions, order, ends, torch.float32),
        ),
        "residual_soft_value": (residual.residual_soft_value_op, (trained_logits, other, 0.7, 1.3)),
        "residual_soft_value_bwd": (
            residual.residual_soft_value_bwd_op,
            (logits, other, per_row, per_row, 0.7, 1.3),
        ),
        "residual_log_probs": (residual.residual_log_probs_op, (trained_logits, other, 0.7, 1.3)),
        "residual_log_probs_bwd": (residual.residual_log_probs_bwd_op, (logits, other, 1.3, torch.bfloat16)),
        "preference_loss": (preference_loss.preference_loss_op, (taken, values, *two_pairs(backend), 0.9, 0.1)),
    }
    return {name: (operator, (backend, *arguments)) for name, (operator, arguments) in calls.items()}
