"""`ops.soft_value`: the definition by hand, identities 1 and 2, gradients, memory, and what it refuses."""

from __future__ import annotations

import dataclasses
from math import atanh, inf, log, nan
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from allocations import LargestAllocation
from backend_cases import (
    BACKENDS,
    DTYPES,
    assert_same,
    each_backend,
    each_backend_and_dtype,
    each_float64_backend,
    place,
    tolerance,
    wide,
)
from fastqadapter import ops
from soft_value_problem import Problem, float64, head_options, problem

pytestmark = pytest.mark.usefixtures("small_tiles")
LOG2, LOG3 = log(2), log(3)

# By hand: V = D = 2, W = 1, h_b = (0, log 3), d = (log 2, 0), so that pi = (1/4, 3/4) and exp(q) = (2, 1).
BY_HAND = {
    # v = log(2 * 1/4 + 1 * 3/4)
    "plain": (log(5 / 4), {}),
    # pi does not count: v = log(2 + 1)
    "alpha_0 = 0": (log(3), {"alpha_0": 0.0}),
    # v = 1/2 log(2^2 (1/4)^2 + 1^2 (3/4)^2) = 1/2 log(4/16 + 9/16)
    "alpha_tilde = 1/2": (log(13 / 16) / 2, {"alpha_tilde": 0.5}),
    # v = log(2 (1/4)^2 + (3/4)^2)
    "alpha_0 = 2": (log(11 / 16), {"alpha_0": 2.0}),
    # b = (log 3, log 3), pi = (1/2, 1/2): v = log((2 + 1) / 2)
    "bias": (log(3 / 2), {"bias": (LOG3, 0.0)}),
    # the same pi, exp(q) = (6, 1): v = log(7 / 2)
    "both biases": (log(7 / 2), {"bias": (LOG3, 0.0), "bias_q": (LOG3, 0.0)}),
    # exp(b) = (1, 9), exp(q) = (4, 1): v = log(4 * 1/10 + 9/10)
    "logit_scale": (log(13 / 10), {"logit_scale": 2.0}),
    # the scale acts on the bias too: exp(b) = (9, 9), exp(q) = (4, 1): v = log(5 / 2)
    "logit_scale, bias": (log(5 / 2), {"logit_scale": 2.0, "bias": (LOG3, 0.0)}),
    # lse(b) is given: log pi = b - log 8 = (-log 8, log 3/8): v = log(2/8 + 3/8)
    "base_lse": (log(5 / 8), {"base_lse": (log(8),)}),
}


@each_backend
@pytest.mark.parametrize("case", BY_HAND)
def test_value_by_hand(case: str, backend: str):
    """The derivations stand beside the numbers, above."""
    expected, changes = BY_HAND[case]
    options = {k: place(backend, float64(v))[0] if isinstance(v, tuple) else v for k, v in changes.items()}
    options = {"alpha_0": 1.0, "alpha_tilde": 1.0, **options}
    tensors = place(backend, float64([[LOG2, 0.0]]), float64([[0.0, LOG3]]), float64([[1.0, 0.0], [0.0, 1.0]]))
    value = ops.soft_value(*tensors, **options, backend=backend)
    assert value.item() == pytest.approx(expected, abs=tolerance(backend))


@each_backend
@pytest.mark.parametrize(("difference", "h_q"), [(False, (LOG2, 0.0)), (True, (LOG2, LOG3))])
def test_softcapped_value_by_hand(difference: bool, h_q: tuple[float, float], backend: str):
    """W = 1 and c = 2. Before the cap x stands as c atanh(x / c), so the capped base logits are (0, log 3), and the
    capped logits of the Q stream are (log 2, 0), or with `difference` (log 2, log 3) - (0, log 3): the same q. So
    v = log(2 * 1/4 + 3/4) as without cap."""

    def before_cap(*logits: float) -> Tensor:
        return float64([[2.0 * atanh(x / 2.0) for x in logits]])

    value = ops.soft_value(
        *place(backend, before_cap(*h_q), before_cap(0.0, LOG3), float64([[1.0, 0.0], [0.0, 1.0]])),
        alpha_0=1.0,
        alpha_tilde=1.0,
        softcap=2.0,
        difference=difference,
        backend=backend,
    )
    assert value.item() == pytest.approx(log(5 / 4), abs=tolerance(backend))


def test_identity_1_one_lm_head_product():
    """`(q + alpha_0 b) / alpha_tilde = W h_c` with `h_c = (d + alpha_0 h_b) / alpha_tilde`; the base normaliser is
    constant over the vocabulary, so it cancels in `pi~ = softmax(W h_c)`, and
    `v = alpha_tilde lse(W h_c) - alpha_0 lse(W h_b)`."""
    d, h_b, weight = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).double().unbind()
    alpha_0, alpha_tilde = 0.7, 1.3
    q, b = d @ weight.T, h_b @ weight.T
    scores = (q + alpha_0 * torch.log_softmax(b, -1)) / alpha_tilde  # as DESIGN.md defines pi~ and v
    combined = ((d + alpha_0 * h_b) / alpha_tilde) @ weight.T

    torch.testing.assert_close(combined.softmax(-1), scores.softmax(-1))
    value = alpha_tilde * combined.logsumexp(-1) - alpha_0 * b.logsumexp(-1)
    torch.testing.assert_close(value, alpha_tilde * scores.logsumexp(-1))
    for backend in BACKENDS:
        tensors = place(backend, d, h_b, weight)
        assert_same(ops.soft_value(*tensors, alpha_0=alpha_0, alpha_tilde=alpha_tilde, backend=backend), value)


@each_backend
def test_identity_2_gradient_is_the_expected_embedding(backend: str):
    """`dv/dd = softmax(W h_c) W = e`, whatever the upstream gradient: it only scales the rows of `e`."""
    case = problem()
    alpha_0, alpha_tilde = case.options["alpha_0"], case.options["alpha_tilde"]
    policy = torch.softmax((case.hidden_q + alpha_0 * case.hidden_b) / alpha_tilde @ case.weight.T, dim=-1)
    upstream = torch.linspace(-1.0, 2.0, len(policy), dtype=torch.float64)
    assert_same(case.to(wide(backend)).run(backend)[2], upstream[:, None] * (policy @ case.weight))


@pytest.mark.parametrize(
    ("train", "cached", "products"), [(True, False, 3), (True, True, 2), (False, False, 2), (False, True, 1)]
)
def test_identity_2_number_of_products(train: bool, cached: bool, products: int):
    """Base LSE, combined scores, expected embedding: 3 products of size N*D*V, forward and backward together. `e` is
    not formed in evaluation, `lse(b)` not where it is given."""
    case = problem(rows=7, vocab=50, size=8)
    lse = torch.logsumexp(case.hidden_b @ case.weight.T, dim=-1) if cached else None
    hidden_q = case.hidden_q.requires_grad_(train)
    with FlopCounterMode(display=False) as counter:
        value = ops.soft_value(hidden_q, case.hidden_b, case.weight, **case.options, base_lse=lse, backend="torch")
        if train:
            value.sum().backward()
    assert counter.get_total_flops() == products * 2 * 7 * 50 * 8


def test_no_expected_embedding_under_no_grad():
    case = problem(rows=7, vocab=50, size=8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.soft_value(case.hidden_q.requires_grad_(), case.hidden_b, case.weight, **case.options, backend="torch")
    assert counter.get_total_flops() == 2 * 2 * 7 * 50 * 8


@each_float64_backend
@pytest.mark.parametrize("return_base_lse", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@head_options
def test_gradcheck(head: str, cached: bool, return_base_lse: bool, backend: str):
    case = problem(head, rows=4, vocab=19, size=3, base_lse=float64([3.0, 2.0, 1.0, 4.0]) if cached else None)
    options = case.options | {"return_base_lse": return_base_lse, "backend": backend}
    hidden_q = case.hidden_q.requires_grad_()
    assert torch.autograd.gradcheck(lambda d: ops.soft_value(d, case.hidden_b, case.weight, **options), hidden_q)


@each_backend_and_dtype
@pytest.mark.parametrize("difference", [False, True])
def test_untrained_difference_head_has_value_exactly_zero(difference: bool, backend: str, dtype: torch.dtype):
    """d = 0 and alpha_0 = alpha_tilde: `v = alpha_tilde log sum pi = 0`."""
    head = "softcap of all" if difference else "bias"
    case = problem(head, vocab=507, size=123, dtype=dtype, alpha_0=1.0, alpha_tilde=1.0)
    hidden_q = case.hidden_b if difference else torch.zeros_like(case.hidden_b)
    options = case.options | {"bias_q": case.options["bias"] if difference else None}
    value, _, gradient = dataclasses.replace(case, hidden_q=hidden_q, options=options).run(backend)
    assert value.abs().max() <= 8 * torch.finfo(value.dtype).eps
    assert gradient.isfinite().all()


@each_backend
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("which", ["hidden_q", "hidden_b"])
@head_options
def test_bad_row_spoils_itself_and_no_other(head: str, which: str, cached: bool, backend: str):
    others = [0, 1, 2, 3, 5]
    for bad in (nan, inf, -inf):
        case = problem(head, rows=6, dtype=torch.float32, base_lse=torch.full((6,), 4.0) if cached else None)
        expected = case.run(backend)
        getattr(case, which)[4, 2] = bad
        value, lse, gradient = case.run(backend)
        assert not value[4].isfinite(), bad
        assert not gradient[4].isfinite().all(), bad
        if which == "hidden_b" and not cached:
            assert not lse[4].isfinite(), bad
        for name, result, clean in zip(("v", "lse", "gradient"), (value, lse, gradient), expected, strict=True):
            assert torch.equal(result[others], clean[others]), (bad, name)


def test_infinite_logits_of_one_sign_give_no_finite_value():
    case = problem(dtype=torch.float32)
    case.weight[:, 2] = -case.weight[:, 2].abs()  # all logits of the row below are -inf
    case.hidden_q[1, 2] = inf
    for backend in BACKENDS:
        assert not case.run(backend)[0][1].isfinite()


@each_backend
@head_options
def test_bad_weight_never_passes_silently(head: str, backend: str):
    """A NaN in W spoils every row. An infinity may, by its sign, only take a token away; its gradient is NaN then."""
    for bad in (nan, inf, -inf):
        case = problem(head, dtype=torch.float32)
        case.weight[20, 2] = bad
        value, _, gradient = case.run(backend)
        assert not (value.isfinite() & gradient.isfinite().all(dim=-1)).any()
        assert value.isnan().all() or bad is not nan


@each_backend_and_dtype
def test_result_dtypes(backend: str, dtype: torch.dtype):
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    for bias_dtype in DTYPES:
        case = problem("scale and biases", dtype=dtype)
        options = {k: x.to(bias_dtype) if isinstance(x, Tensor) else x for k, x in case.options.items()}
        value, lse, gradient = dataclasses.replace(case, options=options).run(backend)
        assert (value.dtype, lse.dtype, gradient.dtype) == (accumulation, accumulation, dtype), bias_dtype


@each_backend_and_dtype
@pytest.mark.parametrize("head", ["bias", "softcap of all"])
def test_no_rows(head: str, backend: str, dtype: torch.dtype):
    case = problem(head, rows=0, dtype=dtype)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    value, lse, gradient = case.run(backend)
    assert value.shape == lse.shape == (0,) and gradient.shape == (0, 6)
    assert value.dtype == lse.dtype == accumulation


@each_backend
@head_options
def test_same_call_twice_gives_the_same_bits_and_leaves_the_arguments(head: str, backend: str):
    case = problem(head, dtype=torch.float32, base_lse=torch.linspace(3.0, 5.0, 5))
    before = case.to(torch.float64)
    first, second = case.run(backend), case.run(backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    after = case.to(torch.float64)
    for name in ("hidden_q", "hidden_b", "weight"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    for name, option in before.options.items():
        assert not isinstance(option, Tensor) or torch.equal(after.options[name], option), name


@each_backend
@head_options
def test_backward_twice_gives_the_same_gradient(head: str, backend: str):
    case = problem(head, dtype=torch.bfloat16)
    hidden_q = case.hidden_q.requires_grad_()
    value, _ = case.value(backend)
    first, second = (torch.autograd.grad(value.sum(), hidden_q, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@each_backend
@pytest.mark.parametrize("curved", [False, True])
def test_second_derivative_is_right_or_refused(curved: bool, backend: str):
    """A gradient penalty, for one; never silently without the derivative of `e`, also where the upstream gradient is
    a constant."""
    case = problem(dtype=wide(backend))

    def second_derivative(backend: str) -> Tensor:
        hidden_q = case.hidden_q.detach().requires_grad_()
        value, _ = dataclasses.replace(case, hidden_q=hidden_q).value(backend)
        total = value.square().sum() if curved else value.sum()
        (gradient,) = torch.autograd.grad(total, hidden_q, create_graph=True)
        return torch.autograd.grad(gradient.square().sum() + value.sum(), hidden_q)[0]

    expected = second_derivative("eager")
    if backend != "eager":
        with pytest.raises(RuntimeError, match="no second derivative: use backend='eager'"):
            second_derivative(backend)
        return
    result = second_derivative(backend)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@head_options
def test_nothing_of_the_size_of_the_logits_or_of_the_weight_is_allocated(head: str, dtype: torch.dtype):
    """N*V and V*D are 10 times the largest of (N, D) and (V,), of a tile of scores still more."""
    rows, vocab, size = 40, 400, 16
    case = problem(head, rows, vocab, size, dtype)
    with LargestAllocation(case.weight) as seen:
        case.run("torch")
    assert seen.nbytes <= 4 * max(rows * size, vocab, 2 * 3 * 16)
    with LargestAllocation(case.weight) as seen:  # the measure itself works
        case.run("eager")
    assert seen.nbytes >= 4 * rows * vocab


@each_float64_backend
@pytest.mark.parametrize("cached", [False, True])
@head_options
def test_no_device_sync(head: str, cached: bool, backend: str):
    """A meta tensor has no data: whatever would wait for the device to read a number fails on it."""
    case = problem(head, base_lse=torch.zeros(5) if cached else None)
    options = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in case.options.items()}
    meta = Problem(case.hidden_q.to("meta"), case.hidden_b.to("meta"), case.weight.to("meta"), options)
    value, _, gradient = meta.run(backend)
    assert value.shape == (5,) and gradient.shape == (5, 6)


# argument, its illegal value, what the message must name
ERRORS: list[tuple[str, Any, str]] = [
    ("alpha_tilde", 0.0, r"alpha_tilde=0\.0 .* \(0, inf\)"),
    ("alpha_tilde", -1.0, r"alpha_tilde=-1\.0 .* \(0, inf\)"),
    ("alpha_tilde", nan, r"alpha_tilde=nan .* \(0, inf\)"),
    ("alpha_tilde", inf, r"alpha_tilde=inf .* \(0, inf\)"),
    ("alpha_0", -0.1, r"alpha_0=-0\.1 .* \[0, inf\)"),
    ("alpha_0", nan, r"alpha_0=nan .* \[0, inf\)"),
    ("alpha_0", inf, r"alpha_0=inf .* \[0, inf\)"),
    ("softcap", 0.0, r"softcap=0\.0 .* \(0, inf\)"),
    ("softcap", -3.0, r"softcap=-3\.0 .* \(0, inf\)"),
    ("softcap", nan, r"softcap=nan .* \(0, inf\)"),
    ("softcap", inf, r"softcap=inf .* \(0, inf\)"),
    ("logit_scale", nan, "logit_scale=nan is not a finite number"),
    ("logit_scale", -inf, "logit_scale=-inf is not a finite number"),
    ("difference", True, "difference=True .* softcap"),
    ("weight", torch.zeros(37, 6, requires_grad=True), r"weight\.requires_grad=True.*requires_grad_\(False\)"),
    ("weight", torch.zeros(37), r"weight has shape \(37,\); expected \(V, D\)"),
    ("alpha_0", torch.tensor(0.7), r"alpha_0=tensor\(.*\) is no Python number: pass float\(alpha_0\)"),
    ("alpha_tilde", "1", "alpha_tilde='1' is no Python number"),
    ("softcap", "1", "softcap='1' is no Python number"),
    ("logit_scale", None, "logit_scale=None is no Python number"),
    ("weight", torch.zeros(37, 0), r"weight has shape \(37, 0\); expected .* D >= 1"),
    ("weight", torch.zeros(0, 6), r"weight has shape \(0, 6\); expected .* V >= 1"),
    ("weight", torch.zeros(37, 6, dtype=torch.int64), r"weight has dtype torch\.int64; expected .*bfloat16"),
    ("weight", torch.zeros(37, 6, device="meta"), "hidden_q is on cpu, weight on meta"),
    ("hidden_q", torch.zeros(5, 7), r"hidden_q has shape \(5, 7\); expected \(N, D\) with D = 6"),
    ("hidden_q", torch.zeros(1, 5, 6), r"hidden_q has shape \(1, 5, 6\); expected \(N, D\)"),
    ("hidden_q", torch.zeros(5, 6, dtype=torch.bfloat16), r"hidden_q has dtype torch\.bfloat16; expected .*float32"),
    ("hidden_q", torch.zeros(5, 6, dtype=torch.int64), r"hidden_q has dtype torch\.int64"),
    ("hidden_q", torch.zeros(5, 6, device="meta"), "hidden_q is on meta, weight on cpu"),
    ("hidden_b", torch.zeros(5, 5), r"hidden_b has shape \(5, 5\); expected \(N, D\) with D = 6"),
    ("hidden_b", torch.zeros(4, 6), "hidden_b has 4 rows, hidden_q 5"),
    ("hidden_b", torch.zeros(5, 6, dtype=torch.float64), r"hidden_b has dtype torch\.float64"),
    ("hidden_b", torch.zeros(5, 6, device="meta"), "hidden_b is on meta, weight on cpu"),
    ("hidden_b", torch.zeros(5, 6, requires_grad=True), r"hidden_b\.requires_grad=True.*hidden_b\.detach\(\)"),
    ("bias", torch.zeros(36), r"bias has shape \(36,\); expected \(V,\) = \(37,\)"),
    ("bias", torch.zeros(37, 1), r"bias has shape \(37, 1\); expected \(V,\)"),
    ("bias", torch.zeros(37, dtype=torch.int64), r"bias has dtype torch\.int64"),
    ("bias", torch.zeros(37, device="meta"), "bias is on meta, weight on cpu"),
    ("bias", torch.zeros(37, requires_grad=True), r"bias\.requires_grad=True"),
    ("bias_q", torch.zeros(38), r"bias_q has shape \(38,\); expected \(V,\) = \(37,\)"),
    ("bias_q", torch.zeros(37, requires_grad=True), r"bias_q\.requires_grad=True"),
    ("base_lse", torch.zeros(4), r"base_lse has shape \(4,\); expected \(N,\) = \(5,\)"),
    ("base_lse", torch.zeros(5, device="meta"), "base_lse is on meta, weight on cpu"),
    ("base_lse", torch.zeros(5, requires_grad=True), r"base_lse\.requires_grad=True"),
    ("backend", "cuda", "backend='cuda' is not one of 'auto', .*'eager'"),
]


@pytest.mark.parametrize(("argument", "value", "message"), ERRORS)
def test_illegal_argument_is_named(argument: str, value: Any, message: str):
    case = problem(dtype=torch.float32)
    arguments = {"hidden_q": case.hidden_q, "hidden_b": case.hidden_b, "weight": case.weight, **case.options}
    with pytest.raises(ValueError, match=message) as caught:
        ops.soft_value(**{**arguments, argument: value})
    assert "\n" not in str(caught.value)


def test_no_rows_excuse_no_illegal_number():
    empty, weight = torch.zeros(0, 6), torch.zeros(37, 6)
    with pytest.raises(ValueError, match="alpha_tilde=0"):
        ops.soft_value(empty, empty, weight, alpha_0=1.0, alpha_tilde=0)
    with pytest.raises(ValueError, match="backend='cuda'"):
        ops.soft_value(empty, empty, weight, alpha_0=1.0, alpha_tilde=1.0, backend="cuda")
