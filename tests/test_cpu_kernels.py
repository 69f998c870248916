"""What the tests of the ops do not reach of the native CPU kernels: every instruction set, shapes and strides by
hypothesis, the 16-bit dtypes bit by bit, and wrong calls. Threads, forks and memory: test_cpu_threads.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastqadapter import ops
from fastqadapter.testing import assert_close_to_truth
from fastqadapter_kernels import cpu, native
from operator_calls import head_arguments
from soft_value_problem import HEADS, Problem, problem

pytestmark = pytest.mark.skipif(native.native_library() is None, reason="no native library: no C++ compiler was found")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- accuracy ---------------------------------------------------------------------------------------------------------


def check(case: Problem, backend: str = "cpu") -> None:
    """v, lse and gradient against eager in float64."""
    for name, *three in zip(
        ("v", "lse", "gradient"), case.run(backend), case.run("eager"), case.to(torch.float64).run("eager"), strict=True
    ):
        assert_close_to_truth(*three, name=name, dtype=case.weight.dtype)


def placed(matrix: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere in memory: at an odd offset, in rows further apart, or column by column."""
    rows, columns = matrix.shape
    if layout == "transposed":
        return matrix.T.contiguous().T
    wider = matrix.new_full((rows, columns + 3), torch.nan)
    wider[:, 1 : columns + 1] = matrix
    return wider[:, 1 : columns + 1] if layout == "strided" else matrix


layouts = st.sampled_from(["contiguous", "strided", "transposed"])


@st.composite
def cases(draw: st.DrawFn) -> Problem:
    """Any shape, dtype, head and layout; flat, peaked or extreme logits; here and there a token that is ruled out."""
    rows, size, vocab = draw(st.integers(1, 300)), draw(st.integers(1, 700)), draw(st.integers(1, 5000))
    dtype = draw(st.sampled_from(DTYPES))
    head = draw(st.sampled_from(list(HEADS)))
    case = problem(head, rows, vocab, size, dtype, logit_scale=HEADS[head].get("logit_scale", 1.0))
    scale = draw(st.sampled_from([1.0, 30.0, 2000.0])) if HEADS[head].get("softcap") is None else 1.0
    hidden_q, hidden_b = case.hidden_q * draw(st.sampled_from([0.0, 0.1, scale])), case.hidden_b * scale
    options = dict(case.options)
    if isinstance(options.get("bias"), Tensor) and options.get("softcap") is None:  # a soft-cap refuses infinities
        options["bias"][1::3] = -torch.inf if options["logit_scale"] > 0 else torch.inf
    return Problem(
        placed(hidden_q, draw(layouts)), placed(hidden_b, draw(layouts)), placed(case.weight, draw(layouts)), options
    )


def test_any_shape_and_layout(isa: str):
    # derandomize: the same cases in every run; a failure is a change of the code.
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(cases())
    def run(case: Problem) -> None:
        check(case)

    run()


@pytest.mark.parametrize(("of_q", "of_b"), [(300.0, 0.0), (0.0, 300.0), (300.0, 300.0), (-300.0, 500.0), (90.0, -40.0)])
@each_dtype
def test_logits_that_rise_from_tile_to_tile(dtype: torch.dtype, of_q: float, of_b: float, isa: str):
    """By so much that the running maximum of a part has to follow, of the scores, of the base logits, or of both."""
    rows, vocab = 35, 7000
    case = problem(rows=rows, vocab=vocab, size=6, dtype=dtype)
    steps = torch.arange(rows)[:, None] % 3 - 1.0  # falling, level, rising
    case.weight[:, 0] = torch.linspace(-1.0, 1.0, vocab)
    case.hidden_q[:, :1], case.hidden_b[:, :1] = of_q * steps, of_b * steps
    check(case)
    logits = [(states.float() @ case.weight.float().T).to(dtype) for states in (case.hidden_q, case.hidden_b)]
    for op in (ops.residual_soft_value, ops.residual_log_probs):

        def run(backend: str, to: torch.dtype, op: Callable[..., Tensor] = op) -> Tensor:
            q, b = (x.to(to) for x in logits)
            return op(q, b, alpha_0=0.7, alpha_tilde=1.3, backend=backend)

        three = run("cpu", dtype), run("eager", dtype), run("eager", torch.float64)
        assert_close_to_truth(*three, name=op.__name__, dtype=dtype)


@pytest.mark.parametrize(("logit", "alpha_tilde"), [(1e4, 1.0), (1234.5, 1e-3), (3e4, 0.01), (1e30, 1.0)])
def test_equal_logits_have_equal_probabilities_however_large(logit: float, alpha_tilde: float, isa: str):
    q = torch.full((2, 3), logit, requires_grad=True)
    log_probs = ops.residual_log_probs(q, torch.zeros(2, 3), alpha_0=1.0, alpha_tilde=alpha_tilde, backend="cpu")
    torch.testing.assert_close(log_probs.exp(), torch.full((2, 3), 1 / 3), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(log_probs[:, 0].sum(), q)
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3]).expand(2, 3) / alpha_tilde
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


def test_known_lse_does_not_overflow_fp16():
    """d + alpha_0 h_b is 102000 here, beyond fp16."""
    hidden_q, hidden_b = torch.full((2, 1, 8), 2000.0).half() * torch.tensor([1, 10])[:, None, None]
    weight = (1e-3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))).half()
    alphas = {"alpha_0": 5.0, "alpha_tilde": 1.0}
    value, lse = ops.soft_value(hidden_q, hidden_b, weight, **alphas, return_base_lse=True, backend="cpu")
    cached = ops.soft_value(hidden_q, hidden_b, weight, **alphas, base_lse=lse, backend="cpu")
    torch.testing.assert_close(cached, value, rtol=1e-4, atol=1e-4)


@st.composite
def logit_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, vocab, scale = draw(st.integers(1, 20)), draw(st.integers(1, 5000)), draw(st.sampled_from([1.0, 100.0]))
    generator = torch.Generator().manual_seed(rows + vocab)
    dtype = draw(st.sampled_from(DTYPES))
    q, b = (scale * torch.randn(2, rows, vocab, generator=generator)).to(dtype)
    return placed(q, draw(layouts)), placed(b, draw(layouts))


@pytest.mark.parametrize("op", [ops.residual_soft_value, ops.residual_log_probs], ids=lambda op: op.__name__)
def test_any_logits(op: Callable[..., Tensor], isa: str):
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(logit_cases())
    def run(case: tuple[Tensor, Tensor]) -> None:
        def result(backend: str, dtype: torch.dtype) -> list[Tensor]:
            q, b = (x if x.dtype == dtype else x.to(dtype) for x in case)
            q = q.detach().requires_grad_()
            found = op(q, b, alpha_0=0.7, alpha_tilde=1.3, backend=backend)
            uneven = torch.linspace(-1.0, 2.0, found.numel()).reshape(found.shape)
            return [found.detach(), *torch.autograd.grad((found * uneven).sum(), q)]

        dtype = case[0].dtype
        three = (result("cpu", dtype), result("eager", dtype), result("eager", torch.float64))
        for name, *each in zip(("result", "gradient"), *three, strict=True):
            assert_close_to_truth(*each, name=name, dtype=dtype)

    run()


def test_any_transitions(isa: str):
    """Taken values and the gradient of the hidden states, with any number of transitions for each state."""

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(cases(), st.integers(1, 300))
    def run(case: Problem, transitions: int) -> None:
        generator = torch.Generator().manual_seed(transitions)
        states = torch.randint(len(case.hidden_q), (transitions,), generator=generator)
        actions = torch.randint(len(case.weight), (transitions,), generator=generator)
        params = ops.HeadParams(0.7, 1.3)

        def result(backend: str, dtype: torch.dtype) -> list[Tensor]:
            q = case.hidden_q.to(dtype).detach().requires_grad_()
            b, w = case.hidden_b.to(dtype), case.weight.to(dtype)
            value, _, taken = ops.state_action_values(q, b, w, params, states, actions, backend=backend)
            return [taken.detach(), *torch.autograd.grad(taken.square().sum() + value.sum(), q)]

        dtype = case.weight.dtype
        three = (result("cpu", dtype), result("eager", dtype), result("eager", torch.float64))
        for name, *each in zip(("taken", "gradient"), *three, strict=True):
            assert_close_to_truth(*each, name=name, dtype=dtype)

    run()


@each_dtype
def test_no_rows(dtype: torch.dtype, isa: str):
    empty, weight = torch.zeros(0, 6, dtype=dtype), torch.zeros(37, 6, dtype=dtype)
    args = (empty, empty, weight, None, None, None, 1.0, 1.0, 1.0, None, False)
    assert [tuple(x.shape) for x in cpu.soft_value_and_gradient(*args)] == [(0,), (0,), (0, 6)]
    assert cpu.taken_value(empty, weight, torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert cpu.residual_log_probs(empty, empty, 1.0, 1.0).shape == (0, 6)


def test_rows_beyond_one_pass():
    """So many rows that they take three passes over the vocabulary: the scratch holds at most 1900 of this size."""
    case = problem(rows=3700, vocab=2000, size=600, dtype=torch.float32)
    whole = cpu.soft_value_and_gradient(*head_arguments(case))
    for first in (0, *range(1200, 1300, 10), *range(2440, 2540, 10), 3690):
        few = Problem(case.hidden_q[first:][:10], case.hidden_b[first:][:10], case.weight, case.options)
        for all_rows, some in zip(whole, cpu.soft_value_and_gradient(*head_arguments(few)), strict=True):
            assert torch.equal(all_rows[first:][:10], some)


# --- the 16-bit dtypes, bit by bit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_is_read_right(dtype: torch.dtype, isa: str):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = patterns.view(dtype)[:, None]
    one = torch.ones(1, 1, dtype=torch.float32).expand(2**16, 1)
    read = cpu.taken_value(one, weight, torch.arange(2**16))
    torch.testing.assert_close(read, weight[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_is_rounded_right(dtype: torch.dtype, isa: str):
    """To the nearest, ties to even: all exponents, with mantissas around every kind of tie."""
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.cat(
        [
            torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000]),
            0x7FFFFF - torch.arange(0, 0x4000, 0x7FF),
            torch.randint(0, 2**23, (64,), generator=generator),
        ]
    )
    bits = (torch.arange(512)[:, None] * 2**23 + mantissas).flatten().to(torch.int32)
    numbers = bits.view(torch.float32)
    count = len(numbers)
    order = torch.arange(count)
    rounded = cpu.hidden_gradient(
        None, None, numbers, torch.ones(1, 1), torch.zeros_like(order), order, torch.arange(count + 1), dtype
    )[:, 0]
    expected = numbers.to(dtype)
    both = rounded.isnan() & expected.isnan()
    # 0 + x: the sign of a zero goes.
    assert torch.equal(rounded[~both] + 0.0, expected[~both] + 0.0)
    assert torch.equal(rounded.isnan(), expected.isnan())


# --- wrong calls ------------------------------------------------------------------------------------------------------


def wrong(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    case = problem("bias", rows=5, dtype=torch.float32)
    names = ("hidden_q", "hidden_b", "weight", "bias_b", "bias_q", "base_lse")
    numbers = {"alpha_0": 0.7, "alpha_tilde": 1.3, "logit_scale": 1.0, "softcap": None, "difference": False}
    keywords = dict(zip(names, head_arguments(case), strict=False)) | numbers
    change(keywords)
    return keywords


SOFT_VALUE_ERRORS = {
    "dtype": (lambda k: k.update(weight=k["weight"].double()), r"weight is float64 \(37, 6\) on cpu"),
    "integers": (lambda k: k.update(hidden_q=torch.zeros(5, 6, dtype=torch.int32)), r"hidden_q is int32 \(5, 6\)"),
    "device": (lambda k: k.update(hidden_b=k["hidden_b"].to("meta")), r"hidden_b is float32 \(5, 6\) on meta"),
    "rows": (lambda k: k.update(hidden_b=k["hidden_b"][:4]), r"hidden_b is float32 \(4, 6\) .* expect .* \(5, 6\)"),
    "columns": (lambda k: k.update(weight=k["weight"][:, :5]), r"hidden_q is float32 \(5, 6\) .* \(5, 5\)"),
    "sparse": (lambda k: k.update(hidden_q=k["hidden_q"].to_sparse()), "sparse"),
    "bias": (lambda k: k.update(bias_b=torch.zeros(38)), r"bias_b is float32 \(38,\) on cpu; .* \(37,\)"),
    "stride": (lambda k: k.update(base_lse=torch.zeros(10)[::2]), r"base_lse is .* strides \(2,\); .* contiguous"),
    "base_lse": (lambda k: k.update(base_lse=torch.zeros(5, dtype=torch.float64)), "base_lse is float64"),
}


@pytest.mark.parametrize("name", SOFT_VALUE_ERRORS)
def test_wrong_soft_value_is_refused(name: str):
    change, message = SOFT_VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=message) as caught:
        cpu.soft_value_and_gradient(**wrong(change))
    assert "\n" not in str(caught.value) and "the CPU kernels expect" in str(caught.value)


def test_wrong_rows_and_logits_are_refused():
    hidden, weight, logits = torch.zeros(5, 6), torch.zeros(37, 6), torch.zeros(4, 9)
    actions = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="actions is"):
        cpu.taken_value(hidden, weight, actions.to("meta"))
    with pytest.raises(ValueError, match=r"states is int64 \(4,\)"):
        cpu.taken_value(hidden, weight, actions, actions[:4])
    with pytest.raises(ValueError, match=r"base_logits is bfloat16"):
        cpu.residual_soft_value(logits, logits.bfloat16(), 1.0, 1.0)
    with pytest.raises(ValueError, match="q_logits is .* strides .* neighbouring columns"):
        cpu.residual_log_probs(torch.zeros(9, 4).T, logits, 1.0, 1.0)
    with pytest.raises(ValueError, match="gradient is float64"):
        cpu.residual_log_probs_bwd(logits, logits, 1.0, torch.float64)
    with pytest.raises(ValueError, match=r"ends is"):
        cpu.hidden_gradient(None, None, hidden[:, 0], weight, actions, actions, actions[::2], torch.float32)
    with pytest.raises(ValueError, match="actions is float32 .* int64 or int32"):
        cpu.taken_value(hidden, weight, actions.float())
    with pytest.raises(ValueError, match="grad_value and expected come together"):
        cpu.hidden_gradient(None, hidden, hidden[:, 0], weight, actions, actions, torch.arange(6), torch.float32)
    with pytest.raises(ValueError, match="values is float64"):
        numbers = torch.zeros(2)
        cpu.preference_loss(numbers, numbers.double(), actions[:2], actions[:3], numbers[:1], numbers[:1], 1.0, 1.0)


def test_indices_outside_touch_no_foreign_memory():
    """What torch.compile cannot check: NaN forward, no gradient backward."""
    hidden, weight = torch.ones(3, 4), torch.ones(5, 4)
    far = 2**40
    found = cpu.taken_value(hidden, weight, torch.tensor([0, -1, far, 4, 0]), torch.tensor([0, 1, 2, far, -3]))
    assert found[0] == 4 and found[1:].isnan().all()
    order, ends = torch.tensor([0, far, -7]), torch.tensor([-5, 1, far, 3])
    actions = torch.tensor([0, 9, -9])
    gradient = cpu.hidden_gradient(None, None, torch.ones(3), weight, actions, order, ends, torch.float32)
    assert torch.equal(gradient, torch.tensor([[1.0], [0.0], [0.0]]).expand(3, 4))
    rows, ends = torch.tensor([far, -far]), torch.tensor([0, 1, 2])
    loss, *_ = cpu.preference_loss(torch.ones(2), torch.ones(3), rows, ends, torch.ones(1), torch.ones(1), 1.0, 1.0)
    assert loss.isnan()
