"""`ops.residual_log_probs` and `ops.residual_soft_value`: the logit-level ops."""

from __future__ import annotations

from math import inf, log, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from backend_cases import (
    assert_same,
    each_backend,
    each_backend_and_dtype,
    each_fast_backend_and_dtype,
    each_float64_backend,
    move,
    place,
    tolerance,
    wide,
)
from fastqadapter import ops
from fastqadapter.testing import assert_close_to_truth

each_op = pytest.mark.parametrize("op", [ops.residual_log_probs, ops.residual_soft_value], ids=lambda op: op.__name__)
ALPHAS: dict[str, Any] = {"alpha_0": 0.7, "alpha_tilde": 1.3}


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    q, b = (2.0 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), b.to(dtype)


def result_and_gradient(op: Any, q: Tensor, b: Tensor, backend: str, **alphas: float) -> tuple[Tensor, Tensor]:
    q, b = move(backend, q.detach(), b)
    q.requires_grad_()
    result = op(q, b, **{**ALPHAS, **alphas}, backend=backend)
    (result * torch.linspace(-1.0, 2.0, result.numel()).view(result.shape).to(result)).sum().backward()
    assert q.grad is not None and q.grad.dtype == q.dtype
    return result.detach(), q.grad


@each_backend
def test_by_hand(backend: str):
    """exp(b) = (1, 3), so pi = (1/4, 3/4); exp(q) = (2, 1). With both alphas 1: pi~ = (2 * 1/4, 3/4) / (5/4) and
    v = log(5/4). With alpha_tilde = 1/2: the squares, pi~ = (4, 9) / 13 and v = 1/2 log(13/16). With alpha_0 = 0: pi
    does not count, pi~ = (2, 1) / 3 and v = log 3."""
    q, b = place(backend, *torch.tensor([[[log(2), 0.0]], [[0.0, log(3)]]], dtype=torch.float64))
    for alpha_0, alpha_tilde, policy, value in (
        (1.0, 1.0, [2 / 5, 3 / 5], log(5 / 4)),
        (1.0, 0.5, [4 / 13, 9 / 13], log(13 / 16) / 2),
        (0.0, 1.0, [2 / 3, 1 / 3], log(3)),
    ):
        options = {"alpha_0": alpha_0, "alpha_tilde": alpha_tilde, "backend": backend}
        assert ops.residual_log_probs(q, b, **options).exp().tolist() == [pytest.approx(policy, abs=tolerance(backend))]
        assert ops.residual_soft_value(q, b, **options).item() == pytest.approx(value, abs=tolerance(backend))


@each_op
@each_fast_backend_and_dtype
@pytest.mark.parametrize("alpha_tilde", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("alpha_0", [0.0, 0.01, 1.0, 5.0])
def test_accuracy(op: Any, alpha_0: float, alpha_tilde: float, backend: str, dtype: torch.dtype):
    alphas = {"alpha_0": alpha_0, "alpha_tilde": alpha_tilde}
    for shape, scale in (((1, 507), 1.0), ((2, 3, 17), 1.0), ((5,), 1.0), ((4, 37), 2e3)):
        q, b = (scale * x for x in logits(*shape, dtype=dtype))
        actual, eager = (result_and_gradient(op, q, b, backend, **alphas) for backend in (backend, "eager"))
        truth = result_and_gradient(op, q.double(), b.double(), "eager", **alphas)
        assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for name, *three in zip(("result", "gradient"), actual, eager, truth, strict=True):
            assert_close_to_truth(*three, name=f"{name} of {shape}", dtype=dtype)


@each_float64_backend
@each_op
def test_gradcheck(op: Any, backend: str):
    q, b = logits(3, 7)
    assert torch.autograd.gradcheck(lambda q: op(q, b, **ALPHAS, backend=backend), q.requires_grad_())


@each_backend
def test_policy_is_normalised_and_agrees_with_the_value(backend: str):
    """`log pi~ = (q + alpha_0 log pi - v) / alpha_tilde`: policy and value are two views of one thing."""
    q, b = place(backend, *logits(4, 37))
    log_policy = ops.residual_log_probs(q, b, **ALPHAS, backend=backend)
    value = ops.residual_soft_value(q, b, **ALPHAS, backend=backend)
    assert_same(log_policy.exp().sum(-1), torch.ones(4))
    scores = q + ALPHAS["alpha_0"] * torch.log_softmax(b, -1)
    torch.testing.assert_close(log_policy, (scores - value[:, None]) / ALPHAS["alpha_tilde"])


@each_backend
def test_gauge_invariance(backend: str):
    """q + c(s) is the same policy, and its value is c(s) higher; b + c(s) changes nothing, as log pi has its own
    normaliser."""
    q, b = logits(4, 37)
    shift = torch.tensor([[-50.0], [0.0], [3.0], [700.0]], dtype=torch.float64)
    q, b, shift = place(backend, q, b, shift)
    # Adding 700 in float32 takes away the digits of the logits below 6e-5.
    near = {} if wide(backend) == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    log_policy = ops.residual_log_probs(q, b, **ALPHAS, backend=backend)
    value = ops.residual_soft_value(q, b, **ALPHAS, backend=backend)
    for q_shift, b_shift in ((shift, 0.0 * shift), (0.0 * shift, shift)):
        same = ops.residual_log_probs(q + q_shift, b + b_shift, **ALPHAS, backend=backend)
        higher = ops.residual_soft_value(q + q_shift, b + b_shift, **ALPHAS, backend=backend)
        torch.testing.assert_close(same, log_policy, **near)
        torch.testing.assert_close(higher, value + q_shift[:, 0], **near)


@each_backend
def test_gradients_by_formula(backend: str):
    """`dv/dq = pi~`; and `d log pi~[a] / dq = (onehot(a) - pi~) / alpha_tilde`."""
    q, b = place(backend, *logits(3, 7))
    policy = ops.residual_log_probs(q, b, **ALPHAS, backend=backend).exp()
    q.requires_grad_()
    (of_value,) = torch.autograd.grad(ops.residual_soft_value(q, b, **ALPHAS, backend=backend).sum(), q)
    (of_log_prob,) = torch.autograd.grad(ops.residual_log_probs(q, b, **ALPHAS, backend=backend)[:, 2].sum(), q)
    torch.testing.assert_close(of_value, policy)
    onehot = torch.zeros_like(policy)
    onehot[:, 2] = 1.0
    torch.testing.assert_close(of_log_prob, (onehot - policy) / ALPHAS["alpha_tilde"])


@each_backend
@pytest.mark.parametrize("alpha_0", [0.0, 0.5])
def test_masked_tokens_have_probability_zero(alpha_0: float, backend: str):
    """-inf in q, in b (where alpha_0 > 0) or in both takes a token away; the others share its probability."""
    q, b = logits(2, 7)
    alphas = {"alpha_0": alpha_0, "alpha_tilde": 1.3}
    kept = [0, 2, 3, 4]
    q[:, [1, 5]] = -inf
    if alpha_0 > 0:
        b[:, [5, 6]] = -inf
    else:
        kept.append(6)
    log_pi = torch.log_softmax(b, -1)[:, kept]
    scores = (q[:, kept] + alpha_0 * log_pi) / 1.3
    q, b = place(backend, q, b)
    q.requires_grad_()
    result = ops.residual_log_probs(q, b, **alphas, backend=backend)
    value = ops.residual_soft_value(q, b, **alphas, backend=backend)
    assert_same(result[:, kept], torch.log_softmax(scores, -1))
    assert_same(value, 1.3 * scores.logsumexp(-1))
    assert (result.exp().sum(-1) - 1).abs().max() < 10 * tolerance(backend)
    (gradient,) = torch.autograd.grad(value.sum() + result[:, 0].sum(), q)
    assert gradient.isfinite().all() and (gradient[:, [1, 5]] == 0).all()


@each_backend
@each_op
@pytest.mark.parametrize("bad", [nan, inf])
def test_bad_logit_spoils_its_own_row_alone(op: Any, bad: float, backend: str):
    for which in (0, 1):
        pair = place(backend, *logits(4, 7))
        expected = op(*pair, **ALPHAS, backend=backend)
        pair[which][2, 3] = bad
        result = op(*pair, **ALPHAS, backend=backend)
        assert not result[2].isfinite().any()
        assert torch.equal(result[[0, 1, 3]], expected[[0, 1, 3]])


@each_backend_and_dtype
@each_op
def test_no_rows(op: Any, backend: str, dtype: torch.dtype):
    result, gradient = result_and_gradient(op, *logits(0, 7, dtype=dtype), backend)
    assert result.shape == ((0, 7) if op is ops.residual_log_probs else (0,)) and gradient.shape == (0, 7)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@each_backend
@each_op
def test_twice_gives_the_same_bits_and_leaves_the_arguments(op: Any, backend: str, poisoned_memory: None):
    q, b = logits(3, 37, dtype=torch.float32)
    before = q.clone(), b.clone()
    first, second = (result_and_gradient(op, q, b, backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first + before, (*second, q, b), strict=True))
    q, b = place(backend, q, b)
    result = op(q.requires_grad_(), b, **ALPHAS, backend=backend).square().sum()
    again = [torch.autograd.grad(result, q, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*again)


@each_backend
@each_op
def test_strided_inputs(op: Any, backend: str):
    q, b = place(backend, *logits(4, 7))
    strided_q = torch.stack([q, q * nan], dim=-1).flatten(1)[:, ::2]
    strided = result_and_gradient(op, strided_q, b.T.contiguous().T, backend)
    for result, expected in zip(strided, result_and_gradient(op, q, b, backend), strict=True):
        torch.testing.assert_close(result, expected)


@each_float64_backend
@each_op
def test_no_device_sync(op: Any, backend: str):
    q, b = (x.to("meta") for x in logits(4, 7))
    assert result_and_gradient(op, q, b, backend)[1].shape == (4, 7)


ERRORS: list[tuple[str, Any, str]] = [
    ("alpha_tilde", 0.0, r"alpha_tilde=0\.0 .* \(0, inf\)"),
    ("alpha_tilde", nan, r"alpha_tilde=nan .* \(0, inf\)"),
    ("alpha_0", -1.0, r"alpha_0=-1\.0 .* \[0, inf\)"),
    ("alpha_0", inf, r"alpha_0=inf .* \[0, inf\)"),
    ("q_logits", torch.zeros(()), r"q_logits has shape \(\); expected \(\.\.\., V\)"),
    ("q_logits", torch.zeros(4, 0), r"q_logits has shape \(4, 0\); expected .* V >= 1"),
    ("q_logits", torch.zeros(4, 7, dtype=torch.int64), r"q_logits has dtype torch\.int64"),
    ("base_logits", torch.zeros(3, 7), r"base_logits has shape \(3, 7\), q_logits \(4, 7\)"),
    ("base_logits", torch.zeros(1, 7), r"base_logits has shape \(1, 7\), q_logits \(4, 7\)"),
    (
        "base_logits",
        torch.zeros(4, 7, dtype=torch.float16),
        r"q_logits has dtype torch\.float32, base_logits .*float16",
    ),
    ("base_logits", torch.zeros(4, 7, device="meta"), "base_logits is on meta, q_logits on cpu"),
    ("base_logits", torch.zeros(4, 7, requires_grad=True), r"base_logits\.requires_grad=True.*\.detach\(\)"),
    ("backend", "numpy", "backend='numpy' is not one of 'auto'"),
]


@each_op
@pytest.mark.parametrize(("argument", "value", "message"), ERRORS)
def test_illegal_argument_is_named(op: Any, argument: str, value: Any, message: str):
    arguments = {"q_logits": torch.zeros(4, 7), "base_logits": torch.zeros(4, 7), **ALPHAS}
    with pytest.raises(ValueError, match=message) as caught:
        op(**{**arguments, argument: value})
    assert "\n" not in str(caught.value)
