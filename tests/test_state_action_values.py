"""`ops.state_action_values`: soft values of states and taken values of transitions, with one gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from backend_cases import each_backend, each_backend_and_dtype, each_float64_backend, move, wide
from fastqadapter import ops
from fastqadapter.ops.state_action_values import IMPLEMENTATIONS
from fastqadapter.testing import assert_close_to_truth
from soft_value_problem import Problem, head_options, problem

pytestmark = pytest.mark.usefixtures("small_tiles")

# Row 0 starts two branches, row 3 has no transition, row 4 three of them, in no order.
STATES = [4, 0, 1, 0, 2, 4, 4]
ACTIONS = [36, 0, 5, 9, 5, 36, 1]


def params_of(case: Problem) -> ops.HeadParams:
    return ops.HeadParams(**case.options)


def values_and_gradient(case: Problem, backend: str) -> tuple[Tensor, ...]:
    """v, lse(b), W[a] . d and the gradient of an uneven sum of v and the products."""
    hidden_q = case.hidden_q.detach().requires_grad_()
    q, b, weight, states, actions = move(
        backend, hidden_q, case.hidden_b, case.weight, torch.tensor(STATES), torch.tensor(ACTIONS)
    )
    params = params_of(case.to(weight.device))
    value, lse, products = ops.state_action_values(q, b, weight, params, states, actions, backend=backend)
    uneven = [torch.linspace(-1, 2, len(x), device=x.device, dtype=x.dtype) for x in (value, products)]
    (value @ uneven[0] + products @ uneven[1]).backward()
    assert hidden_q.grad is not None and hidden_q.grad.dtype == hidden_q.dtype and not lse.requires_grad
    return value.detach().cpu(), lse.cpu(), products.detach().cpu(), hidden_q.grad


@each_backend
def test_is_soft_value_and_taken_value(backend: str):
    case = problem("bias", dtype=wide(backend))
    q, b, weight, states, actions = move(
        backend, case.hidden_q, case.hidden_b, case.weight, torch.tensor(STATES), torch.tensor(ACTIONS)
    )
    value, lse, products = ops.state_action_values(
        q, b, weight, params_of(case.to(weight.device)), states, actions, backend=backend
    )
    expected_value, expected_lse = case.value(backend)
    assert torch.equal(value, expected_value) and torch.equal(lse, expected_lse)
    assert torch.equal(products, ops.taken_value(q[states], weight, actions, backend=backend))


@each_backend
def test_with_a_known_lse(backend: str):
    """Values, products and gradient are those that it finds itself, and the lse is handed through."""
    case = problem("bias", dtype=wide(backend))
    tensors = [case.hidden_q, case.hidden_b, case.weight, torch.tensor(STATES), torch.tensor(ACTIONS)]
    results = []
    for known in (False, True):
        q, b, weight, states, actions = move(backend, *tensors)
        q = q.detach().requires_grad_()
        lse = case.value(backend)[1].to(weight.device) if known else None
        params = params_of(case.to(weight.device))
        value, found, products = ops.state_action_values(
            q, b, weight, params, states, actions, base_lse=lse, backend=backend
        )
        assert lse is None or torch.equal(found, lse)
        results.append([value, products, torch.autograd.grad(value.sum() + products.sum(), q)[0]])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"base_lse .*\(3,\)"):
        ops.state_action_values(q, b, weight, params, states, actions, base_lse=torch.zeros(3), backend=backend)


@each_backend_and_dtype
@head_options
def test_accuracy(head: str, backend: str, dtype: torch.dtype):
    case = problem(head, dtype=dtype)
    truth = values_and_gradient(case.to(torch.float64), "eager")
    results = values_and_gradient(case, backend), values_and_gradient(case, "eager"), truth
    for name, *three in zip(("v", "base_lse", "products", "gradient"), *results, strict=True):
        assert_close_to_truth(*three, name=name, dtype=dtype)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_states_on_a_16_bit_head(backend: str, dtype: torch.dtype):
    """As the loss gives them: d = h_q - h_b in fp32, which the products must not round."""
    case = problem("bias", vocab=507, size=123, dtype=torch.float32)
    case = dataclasses.replace(case, weight=case.weight.to(dtype))
    results = (values_and_gradient(x, name) for x, name in ((case, backend), (case.to(torch.float64), "eager")))
    eager = values_and_gradient(case, "eager")
    for name, actual, truth, same in zip(("v", "lse", "products", "gradient"), *results, eager, strict=True):
        fine = torch.float32 if name == "products" else dtype
        assert_close_to_truth(actual, same, truth, name=name, dtype=fine)


@each_float64_backend
@head_options
def test_gradcheck(head: str, backend: str):
    case = problem(head, vocab=37, size=3)
    states, actions = torch.tensor(STATES), torch.tensor(ACTIONS)

    def values(hidden_q: Tensor) -> tuple[Tensor, Tensor]:
        value, _, products = ops.state_action_values(
            hidden_q, case.hidden_b, case.weight, params_of(case), states, actions, backend=backend
        )
        return value, products

    assert torch.autograd.gradcheck(values, case.hidden_q.requires_grad_())


@each_backend
def test_no_transitions(backend: str):
    """Only values: the gradient is that of `soft_value`."""
    case = problem(dtype=wide(backend))
    hidden_q = case.hidden_q.requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    tensors = move(backend, hidden_q, case.hidden_b, case.weight)
    value, _, products = ops.state_action_values(*tensors, params_of(case), *move(backend, none, none), backend=backend)
    assert products.shape == (0,)
    (gradient,) = torch.autograd.grad(value.sum(), hidden_q)
    (expected,) = torch.autograd.grad(ops.soft_value(*tensors, **case.options, backend=backend).sum(), hidden_q)
    torch.testing.assert_close(gradient, expected)


def test_kernel_gives_nan_for_a_state_that_no_check_may_look_at():
    pytest.importorskip("triton", reason="Triton is not installed")
    case = problem(dtype=torch.float32)
    tensors = move("triton", case.hidden_q.requires_grad_(), case.hidden_b, case.weight)
    indices = move("triton", torch.tensor([-1, 0, 5, 4]), torch.tensor([1, 2, 3, 4]))
    value, _, products = IMPLEMENTATIONS["triton"].run(*tensors, params_of(case), *indices, None)
    assert products.isnan().tolist() == [True, False, True, False] and value.isfinite().all()
    (gradient,) = torch.autograd.grad(products.nan_to_num().sum(), case.hidden_q)
    assert gradient.isfinite().all()


ERRORS: list[tuple[str, Any, str]] = [
    ("states", torch.zeros(7), r"states is torch\.float32 \(7,\); expected \(M,\) int64 or int32"),
    ("states", torch.zeros(7, 1, dtype=torch.int64), r"states is torch\.int64 \(7, 1\)"),
    ("states", torch.zeros(7, dtype=torch.int64, device="meta"), "states is on meta, weight on cpu"),
    ("states", torch.full((7,), 5), r"state 5 is outside the rows of hidden_q \[0, 5\)"),
    ("states", torch.full((7,), -1), r"state -1 is outside the rows of hidden_q"),
    ("actions", torch.zeros(6, dtype=torch.int64), r"actions has shape \(6,\); expected \(M,\) = \(7,\)"),
    ("actions", torch.full((7,), 37), r"action 37 is outside the vocabulary \[0, 37\)"),
    ("hidden_q", torch.zeros(0, 6), "hidden_b has 5 rows, hidden_q 0"),
    ("params", ops.HeadParams(1.0, 0.0), r"alpha_tilde=0\.0 .* \(0, inf\)"),
    ("weight", torch.zeros(37, 6, requires_grad=True), r"weight\.requires_grad=True"),
]


@pytest.mark.parametrize(("argument", "value", "message"), ERRORS)
def test_illegal_argument_is_named(argument: str, value: Any, message: str):
    case = problem(dtype=torch.float32)
    arguments = {
        "hidden_q": case.hidden_q,
        "hidden_b": case.hidden_b,
        "weight": case.weight,
        "params": params_of(case),
        "states": torch.tensor(STATES),
        "actions": torch.tensor(ACTIONS),
    }
    with pytest.raises(ValueError, match=message) as caught:
        ops.state_action_values(**{**arguments, argument: value})
    assert "\n" not in str(caught.value)
