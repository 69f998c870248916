"""`ops.taken_value`: a gather and a dot product, never a rounded logit."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from backend_cases import (
    each_backend,
    each_backend_and_dtype,
    each_float64_backend,
    move,
    place,
    wide,
)
from fastqadapter import ops
from fastqadapter.ops.taken_value import IMPLEMENTATIONS
from fastqadapter.testing import assert_close_to_truth


def problem(rows: int = 5, vocab: int = 37, size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + vocab + size)
    hidden_q, weight = (torch.randn(n, size, generator=generator).to(dtype) for n in (rows, vocab))
    return hidden_q, weight, torch.randint(vocab, (rows,), generator=generator)


def value_and_gradient(hidden_q: Tensor, weight: Tensor, actions: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    hidden_q, weight, actions = move(backend, hidden_q, weight, actions)
    hidden_q = hidden_q.detach().requires_grad_()
    value = ops.taken_value(hidden_q, weight, actions, backend=backend)
    (value * torch.linspace(-1.0, 2.0, len(value)).to(value)).sum().backward()
    assert hidden_q.grad is not None and hidden_q.grad.dtype == hidden_q.dtype and weight.grad is None
    return value.detach(), hidden_q.grad


@each_backend
def test_by_hand(backend: str):
    """q[2] = 3 * 5 - 1 * 6 and q[0] = 2 * 1 + 4 * 2, with gradients W[2] and W[0] times the upstream -1 and 2."""
    hidden_q = torch.tensor([[3.0, -1.0], [2.0, 4.0]], dtype=wide(backend))
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=wide(backend))
    value, gradient = value_and_gradient(hidden_q, weight, torch.tensor([2, 0]), backend)
    assert value.tolist() == [9.0, 10.0]
    assert gradient.tolist() == [[-5.0, -6.0], [2.0, 4.0]]


@each_float64_backend
def test_gradcheck(backend: str):
    hidden_q, weight, actions = problem()
    assert torch.autograd.gradcheck(
        lambda d: ops.taken_value(d, weight, actions, backend=backend), hidden_q.requires_grad_()
    )


@each_backend_and_dtype
@pytest.mark.parametrize(("rows", "vocab", "size"), [(1, 507, 123), (7, 33, 576), (3, 33, 2500), (2, 1, 1)])
def test_accuracy(rows: int, vocab: int, size: int, backend: str, dtype: torch.dtype):
    """Products of 16-bit numbers are exact in fp32, so the value is as good as that of fp32 in every dtype."""
    hidden_q, weight, actions = problem(rows, vocab, size, dtype)
    value, gradient = value_and_gradient(hidden_q, weight, actions, backend)
    eager, _ = value_and_gradient(hidden_q, weight, actions, "eager")
    true_value, true_gradient = value_and_gradient(hidden_q.double(), weight.double(), actions, "eager")
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_to_truth(value, eager, true_value, name="q[a]")
    assert_close_to_truth(gradient, true_gradient, true_gradient, name="dq/dd", dtype=dtype)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_states_on_a_16_bit_head_are_not_rounded(dtype: torch.dtype, backend: str):
    """What a difference h_q - h_b needs: it is far finer than the 16-bit states that it comes from."""
    hidden_q, weight, actions = problem(size=576, dtype=torch.float32)
    weight = weight.to(dtype)
    value, gradient = value_and_gradient(hidden_q, weight, actions, backend)
    true_value, true_gradient = value_and_gradient(hidden_q.double(), weight.double(), actions, "eager")
    assert_close_to_truth(value, true_value, true_value, name="q[a]")
    assert_close_to_truth(gradient, true_gradient, true_gradient, name="dq/dd")


@each_backend
def test_strided_inputs_int32_actions_and_repeated_actions(backend: str):
    hidden_q, weight, _ = problem(dtype=wide(backend))
    actions = torch.tensor([36, 0, 36, 36, 1])
    expected = value_and_gradient(hidden_q, weight, actions, backend)
    strided = value_and_gradient(
        torch.stack([hidden_q, hidden_q * nan], dim=-1).flatten(1)[:, ::2],
        weight.T.contiguous().T,
        actions.repeat_interleave(2)[::2].int(),
        backend,
    )
    assert all(torch.equal(a, b) for a, b in zip(strided, expected, strict=True))


@each_backend
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_bad_state_spoils_its_own_row_alone(bad: float, backend: str):
    hidden_q, weight, actions = problem(dtype=wide(backend))
    expected, _ = value_and_gradient(hidden_q, weight, actions, backend)
    hidden_q[3, 2] = bad
    value, gradient = value_and_gradient(hidden_q, weight, actions, backend)
    assert not value[3].isfinite()
    assert torch.equal(value[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])
    assert gradient.isfinite().all()  # the gradient is W[a], whatever the state


@each_backend
def test_bad_weight_counts_only_where_it_is_taken(backend: str):
    hidden_q, weight, _ = problem(dtype=wide(backend))
    weight[7] = nan
    value, gradient = value_and_gradient(hidden_q, weight, torch.tensor([6, 7, 8, 7, 0]), backend)
    assert value.isnan().tolist() == gradient[:, 0].isnan().tolist() == [False, True, False, True, False]


@each_backend_and_dtype
def test_no_rows(backend: str, dtype: torch.dtype):
    hidden_q, weight, actions = problem(rows=0, dtype=dtype)
    value, gradient = value_and_gradient(hidden_q, weight, actions, backend)
    assert value.shape == (0,) and gradient.shape == (0, 6)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@each_backend
def test_twice_gives_the_same_bits(backend: str, poisoned_memory: None):
    hidden_q, weight, actions = problem(dtype=torch.bfloat16)
    first, second = (value_and_gradient(hidden_q, weight, actions, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    hidden_q, weight, actions = move(backend, hidden_q, weight, actions)
    value = ops.taken_value(hidden_q.requires_grad_(), weight, actions, backend=backend)
    again = [torch.autograd.grad(value.sum(), hidden_q, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*again)


@each_backend
def test_action_outside_is_nan_where_no_check_may_look(backend: str):
    """On an accelerator the range of the actions is not read; the value of such an action must then be NaN, and its
    gradient 0."""
    hidden_q, weight, actions = place(backend, *problem()[:2], torch.tensor([-1, 0, 37, 36, 10**9]))
    value = IMPLEMENTATIONS[backend].run(hidden_q.requires_grad_(), weight, actions)
    assert value.isnan().tolist() == [True, False, True, False, True]
    (gradient,) = torch.autograd.grad(value.nan_to_num().sum(), hidden_q)
    assert (gradient == 0).all(dim=1).tolist() == [True, False, True, False, True]


@each_float64_backend
def test_no_device_sync(backend: str):
    hidden_q, weight, actions = (tensor.to("meta") for tensor in problem())
    value, gradient = value_and_gradient(hidden_q, weight, actions, backend)
    assert value.shape == (5,) and gradient.shape == (5, 6)


ERRORS: list[tuple[str, Any, str]] = [
    ("actions", torch.tensor([0, 1, 37, 2, 3]), r"action 37 is outside the vocabulary \[0, 37\)"),
    ("actions", torch.tensor([0, 1, -100, 2, 3]), r"action -100 is outside the vocabulary \[0, 37\)"),
    ("actions", torch.zeros(4, dtype=torch.int64), r"actions has shape \(4,\); expected \(N,\) = \(5,\)"),
    ("actions", torch.zeros(5, 1, dtype=torch.int64), r"actions has shape \(5, 1\)"),
    ("actions", torch.zeros(5), r"actions has dtype torch\.float32; expected torch\.int64"),
    ("actions", torch.zeros(5, dtype=torch.bool), r"actions has dtype torch\.bool"),
    ("actions", torch.zeros(5, dtype=torch.int64, device="meta"), "actions is on meta, weight on cpu"),
    ("hidden_q", torch.zeros(5, 7), r"hidden_q has shape \(5, 7\); expected \(N, D\) with D = 6"),
    ("hidden_q", torch.zeros(6), r"hidden_q has shape \(6,\)"),
    ("hidden_q", torch.zeros(5, 6, dtype=torch.float16), r"hidden_q has dtype torch\.float16; expected .*float32"),
    ("hidden_q", torch.zeros(5, 6, device="meta"), "hidden_q is on meta, weight on cpu"),
    ("weight", torch.zeros(37, 6, requires_grad=True), r"weight\.requires_grad=True.*requires_grad_\(False\)"),
    ("weight", torch.zeros(1, 37, 6), r"weight has shape \(1, 37, 6\); expected \(V, D\)"),
    ("weight", torch.zeros(37, 6, dtype=torch.int8), r"weight has dtype torch\.int8"),
    ("backend", "Eager", "backend='Eager' is not one of 'auto', .*'eager'"),
]


@pytest.mark.parametrize(("argument", "value", "message"), ERRORS)
def test_illegal_argument_is_named(argument: str, value: Any, message: str):
    arguments = dict(zip(("hidden_q", "weight", "actions"), problem(dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=message) as caught:
        ops.taken_value(**{**arguments, argument: value})
    assert "\n" not in str(caught.value)
