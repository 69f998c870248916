"""The operators of both backends with kernels: `torch.library`'s contract, and `torch.compile`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backend_cases import FUSED_BACKENDS, device_of, move
from fastqadapter import ops
from operator_calls import operator_calls, two_pairs
from soft_value_problem import problem

each_fused_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)


@each_fused_backend
@pytest.mark.parametrize("name", operator_calls("cpu"))
def test_opcheck(name: str, backend: str):
    """Schema, fake kernel, gradient registration and tracing of every operator."""
    operator, arguments = operator_calls(backend)[name]
    moved = tuple(move(backend, x)[0] if isinstance(x, Tensor) and not x.requires_grad else x for x in arguments)
    torch.library.opcheck(operator, moved)


@each_fused_backend
def test_compiles_with_numbers_that_change(backend: str):
    """An annealed temperature, and batches of other sizes."""
    torch.compiler.reset()
    compiled = torch.compile(ops.residual_log_probs, fullgraph=True, backend="aot_eager")
    for rows, alpha in ((2, 0.5), (3, 0.6), (5, 0.7)):
        q, b = torch.randn(2, rows, 7, device=device_of(backend))
        result = compiled(q, b, alpha_0=alpha, alpha_tilde=1.3, backend=backend)
        torch.testing.assert_close(
            result, ops.residual_log_probs(q, b, alpha_0=alpha, alpha_tilde=1.3, backend="eager")
        )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["triton", "cpu", "auto", "torch"])
def test_compiles_as_one_graph(compiler: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    """Loss and backward of a batch, without a graph break; `auto` decides while it is traced."""
    # inductor imports setuptools, which refuses to be imported after the standard library's distutils.
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    placed = "cpu" if backend == "cpu" else "triton"
    device = device_of(placed)
    case = problem(rows=4, dtype=torch.float32).to(device)
    states, actions = torch.tensor([0, 1, 0, 2, 2, 3], device=device), torch.arange(6, device=device)
    config = SimpleNamespace(gamma=0.9, beta=0.1)

    def loss(hidden_q: Tensor, hidden_b: Tensor, weight: Tensor, *pairs: Tensor) -> tuple[Tensor, Tensor]:
        params = ops.HeadParams(0.7, 1.3)
        value, _, taken = ops.state_action_values(hidden_q, hidden_b, weight, params, states, actions, backend=backend)
        total, metrics = ops.preference_loss(taken, value, ops.Pairs(*pairs), config, backend=backend)
        apart = ops.soft_value(hidden_q, hidden_b, weight, alpha_0=1.0, alpha_tilde=1.0, backend=backend).sum()
        logits = hidden_q @ weight.T, hidden_b @ weight.T
        policy = ops.residual_log_probs(*logits, alpha_0=1.0, alpha_tilde=1.0, backend=backend)
        soft = ops.residual_soft_value(*logits, alpha_0=1.0, alpha_tilde=1.0, backend=backend)
        one = ops.taken_value(hidden_q, weight, actions[:4], backend=backend)
        return total + apart + policy[:, 3].sum() + soft.sum() + one.sum(), metrics["rewards/margins"]

    def run(function: Any) -> tuple[Tensor, ...]:
        hidden_q = case.hidden_q.clone().requires_grad_()
        total, margins = function(hidden_q, case.hidden_b, case.weight, *two_pairs(placed))
        total.backward()
        assert hidden_q.grad is not None
        return total.detach(), margins, hidden_q.grad

    torch.compiler.reset()
    for compiled, plain in zip(run(torch.compile(loss, fullgraph=True, backend=compiler)), run(loss), strict=True):
        torch.testing.assert_close(compiled, plain)
