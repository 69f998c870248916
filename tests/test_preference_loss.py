"""`ops.preference_loss`: from taken values and soft values to the loss of a batch of pairs."""

from __future__ import annotations

import dataclasses
from math import exp, inf, log, log1p, nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backend_cases import (
    BACKENDS,
    FUSED_BACKENDS,
    each_backend,
    each_float64_backend,
    move,
    place,
    serves,
    tolerance,
    wide,
)
from fastqadapter import ops
from fastqadapter.ops import Pairs
from fastqadapter.ops.preference_loss import IMPLEMENTATIONS
from fastqadapter.testing import assert_close_to_truth

float64 = torch.float64
CONFIG = SimpleNamespace(gamma=0.5, beta=0.1)


def preference_loss(
    q_taken: Tensor, values: Tensor, pairs: Pairs, config: Any, backend: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The op where the backend runs and in the widest dtype that it has; results on the CPU."""
    fields = {field.name: move(backend, getattr(pairs, field.name))[0] for field in dataclasses.fields(pairs)}
    q_taken, values = place(backend, q_taken, values) if wide(backend) != float64 else (q_taken, values)
    loss, metrics = ops.preference_loss(q_taken, values, Pairs(**fields), config, backend=backend)
    if q_taken.device.type == "meta":
        return loss, metrics
    return loss.cpu(), {name: metric.cpu() for name, metric in metrics.items()}


# Two pairs, six transitions: chosen 2 and rejected 1 tokens; chosen 1 and rejected 2. Rows 0 and 2 are the prompts'.
Q_TAKEN = [3.0, 1.0, 2.0, 0.5, 4.0, -1.0]
VALUES = [7.0, 2.0, 8.0, 4.0]
VALUE_ROWS = [1, -1, -1, -1, 3, -1]


def two_pairs(device: str = "cpu") -> Pairs:
    return Pairs(
        value_rows=torch.tensor(VALUE_ROWS, device=device),
        branch_ends=torch.tensor([0, 2, 3, 4, 6], device=device),
        divisor=torch.tensor([2.0, 4.0], device=device),
        squares_divisor=torch.tensor([3.0, 3.0], device=device),
    )


def inputs(dtype: torch.dtype = float64) -> tuple[Tensor, Tensor]:
    return torch.tensor(Q_TAKEN, dtype=dtype, requires_grad=True), torch.tensor(VALUES, dtype=dtype, requires_grad=True)


def random_batch(lengths: list[tuple[int, int]], seed: int = 0) -> tuple[Tensor, Tensor, Pairs]:
    """Pairs with so many chosen and rejected tokens, every transition with a value row of its own."""
    counts = torch.tensor(lengths)
    total = int(counts.sum())
    generator = torch.Generator().manual_seed(seed)
    q_taken, values = torch.randn(2, total, generator=generator, dtype=float64)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.flatten().cumsum(0)])
    pairs = Pairs(torch.arange(total), ends, counts.amax(1).float(), counts.sum(1).float())
    return q_taken, values, pairs


@each_backend
def test_two_pairs_by_hand(backend: str):
    """gamma = 1/2, beta = 1/10, and v = 2 in row 1, 4 in row 3.

    Pair 1: rewards 3 - 2/2 = 2 and 1 | 2.  Sums 3 | 2, divisor 2, margin 1/2.  Mean square (4 + 1 + 4) / 3 = 3.
            loss_1 = log(1 + e^(-1/2)) + 3/10
    Pair 2: rewards 1/2 | 4 - 4/2 = 2 and -1.  Sums 1/2 | 1, divisor 4, margin -1/8.  Mean square (1/4 + 4 + 1)/3 = 7/4.
            loss_2 = log(1 + e^(1/8)) + 7/40

    loss = (loss_1 + loss_2) / 2. With s_1 = 1 / (1 + e^(1/2)) and s_2 = 1 / (1 + e^(-1/8)), minus the slope of
    -log sigmoid, the gradient with respect to reward r_t of pair i is 1/2 (-+ s_i / divisor_i + beta 2 r_t / 3), the
    upper sign for the chosen branch. q_taken gets just that, a value -gamma times that of its transition:
        dq_1 = 1/2 (-s_1 / 2 + 4/30)    dq_5 = 1/2 (s_2 / 4 + 4/30)    dv_1 = -dq_1 / 2    dv_3 = -dq_5 / 2
    """
    q_taken, values = inputs()
    loss, metrics = preference_loss(q_taken, values, two_pairs(), CONFIG, backend)
    preference = [log1p(exp(-1 / 2)), log1p(exp(1 / 8))]
    assert loss.item() == pytest.approx((sum(preference) + 3 / 10 + 7 / 40) / 2, abs=tolerance(backend))
    assert loss.dim() == 0 and not any(metric.requires_grad for metric in metrics.values())
    expected = {
        "pref_loss": preference,
        "chi2_loss": [3, 7 / 4],
        "rewards/chosen": [3 / 2, 1 / 8],
        "rewards/rejected": [1, 1 / 4],
        "rewards/margins": [1 / 2, -1 / 8],
        "rewards/accuracies": [1, 0],
        "q_values/mean": [2, 7 / 6],
        "values/mean": [1 / 3, 2 / 3],
    }
    assert {name: metric.tolist() for name, metric in metrics.items()} == {
        name: pytest.approx(value, abs=tolerance(backend)) for name, value in expected.items()
    }

    loss.backward()
    s_1, s_2 = 1 / (1 + exp(1 / 2)), 1 / (1 + exp(-1 / 8))
    slopes = (-s_1 / 2, -s_1 / 2, s_1 / 2, -s_2 / 4, s_2 / 4, s_2 / 4)
    by_hand = [(slope + 0.2 * r / 3) / 2 for slope, r in zip(slopes, (2, 1, 2, 1 / 2, 2, -1), strict=True)]
    assert q_taken.grad.tolist() == pytest.approx(by_hand, abs=tolerance(backend))
    assert values.grad.tolist() == pytest.approx([0, -by_hand[0] / 2, 0, -by_hand[4] / 2], abs=tolerance(backend))


@each_float64_backend
def test_gradcheck(backend: str):
    def loss(q_taken: Tensor, values: Tensor) -> Tensor:
        return preference_loss(q_taken, values, two_pairs(), CONFIG, backend)[0]

    assert torch.autograd.gradcheck(loss, inputs())


@each_backend
def test_zero_rewards_give_log_2_at_chance(backend: str):
    zeros = torch.zeros(6), torch.zeros(4)
    loss, metrics = preference_loss(*zeros, two_pairs(), CONFIG, backend)
    assert loss.item() == pytest.approx(log(2), rel=1e-7)
    assert metrics["rewards/accuracies"].tolist() == [0.5, 0.5]


@each_backend
def test_swapping_chosen_and_rejected_flips_the_margin(backend: str):
    """-log sigmoid(m) - (-log sigmoid(-m)) = -m, and the regulariser does not know the branches apart."""
    q_taken, values, pairs = random_batch([(3, 2)])
    swap = torch.tensor([3, 4, 0, 1, 2])
    swapped = dataclasses.replace(pairs, branch_ends=torch.tensor([0, 2, 5]))
    loss, metrics = preference_loss(q_taken, values, pairs, CONFIG, backend)
    other_loss, other = preference_loss(q_taken[swap], values[swap], swapped, CONFIG, backend)
    torch.testing.assert_close(other["rewards/margins"], -metrics["rewards/margins"])
    torch.testing.assert_close(other["chi2_loss"], metrics["chi2_loss"])
    torch.testing.assert_close(loss - other_loss, -metrics["rewards/margins"][0])
    assert (metrics["rewards/accuracies"] + other["rewards/accuracies"]).item() == 1.0


@each_backend
def test_loss_is_the_mean_over_pairs_each_as_if_alone(backend: str):
    lengths = [(3, 2), (1, 1), (7, 30), (4, 4)]
    q_taken, values, pairs = random_batch(lengths)
    loss, metrics = preference_loss(q_taken, values, pairs, CONFIG, backend)
    alone = []
    for i, (start, stop) in enumerate(zip(pairs.branch_ends[:-1:2], pairs.branch_ends[2::2], strict=True)):
        _, _, pair = random_batch([lengths[i]])
        one, one_metrics = preference_loss(q_taken[start:stop], values[start:stop], pair, CONFIG, backend)
        alone.append(one)
        for name, metric in metrics.items():
            assert torch.equal(metric[i : i + 1], one_metrics[name]), name
    torch.testing.assert_close(loss, torch.stack(alone).mean())


@each_backend
def test_order_of_pairs_does_not_matter(backend: str):
    lengths = [(3, 2), (1, 4), (2, 2)]
    q_taken, values, pairs = random_batch(lengths)
    blocks = torch.arange(14).split([5, 5, 4])
    order = torch.cat([blocks[2], blocks[0], blocks[1]])
    _, _, reordered = random_batch([lengths[2], lengths[0], lengths[1]])
    loss, _ = preference_loss(q_taken, values, pairs, CONFIG, backend)
    same, _ = preference_loss(q_taken[order], values[order], reordered, CONFIG, backend)
    torch.testing.assert_close(loss, same)


@each_backend
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_bad_number_never_gives_a_finite_loss(bad: float, beta: float, backend: str):
    """A chosen reward of +inf is the trap: its -log sigmoid is 0. So is an infinite value whose gamma is 0."""
    for gamma in (0.0, 1.0):
        config = SimpleNamespace(gamma=gamma, beta=beta)
        for index in range(6):
            q_taken, values = (tensor.detach() for tensor in inputs())
            q_taken[index] = bad
            assert not preference_loss(q_taken, values, two_pairs(), config, backend)[0].isfinite()
        for row in (1, 3):
            q_taken, values = (tensor.detach() for tensor in inputs())
            values[row] = bad
            assert not preference_loss(q_taken, values, two_pairs(), config, backend)[0].isfinite()


@each_backend
def test_opposite_infinities_do_not_cancel(backend: str):
    q_taken, values = (tensor.detach() for tensor in inputs())
    q_taken[0], q_taken[2] = inf, inf
    loss, _ = preference_loss(q_taken, values, two_pairs(), SimpleNamespace(gamma=1.0, beta=0.0), backend)
    assert not loss.isfinite()


@each_backend
def test_value_that_no_transition_uses_does_not_count(backend: str):
    """Row 0 is also what a terminal state, row -1, is clamped to."""
    q_taken, values = inputs()
    loss, _ = preference_loss(q_taken, values, two_pairs(), CONFIG, backend)
    poisoned = torch.tensor([nan, 2.0, inf, 4.0], dtype=float64, requires_grad=True)
    same, _ = preference_loss(q_taken, poisoned, two_pairs(), CONFIG, backend)
    assert torch.equal(loss, same)
    same.backward()
    assert poisoned.grad.isfinite().all() and (poisoned.grad[[0, 2]] == 0).all()


@each_backend
def test_margins_far_out_keep_their_loss_and_slope(backend: str):
    """-log sigmoid(-3000) = 3000, with slope -1; -log sigmoid(3000) = 0, with slope 0."""
    pairs = Pairs(torch.tensor([-1, -1]), torch.tensor([0, 1, 2]), torch.ones(1), torch.full((1,), 2.0))
    for sign, loss_by_hand, slope in ((-1.0, 3000.0, -1.0), (1.0, 0.0, 0.0)):
        q_taken = torch.tensor([sign * 3000.0, 0.0], requires_grad=True)
        config = SimpleNamespace(gamma=1.0, beta=0.0)
        loss, _ = preference_loss(q_taken, torch.zeros(1), pairs, config, backend)
        loss.backward()
        assert (loss.item(), q_taken.grad.tolist()) == (loss_by_hand, [slope, -slope])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("branch_ends", [0, 2, 3, 4, 9]),
        ("branch_ends", [0, 2, 1, 4, 6]),
        ("branch_ends", [-3, 2, 3, 4, 6]),
        ("value_rows", [1, -1, -1, -1, 999, -1]),
    ],
)
def test_kernel_survives_what_no_check_may_look_at(field: str, value: list[int]):
    """On a GPU no check reads the indices: the kernel then touches no foreign memory, and the loss is NaN."""
    pytest.importorskip("triton", reason="Triton is not installed")
    pairs = dataclasses.replace(two_pairs(), **{field: torch.tensor(value)})
    q_taken, values, *fields = place("triton", *inputs(), *(getattr(pairs, f.name) for f in dataclasses.fields(pairs)))
    args = (q_taken, values, Pairs(*(x.float() if x.is_floating_point() else x for x in fields)), 0.5, 0.1)
    loss, _ = IMPLEMENTATIONS["triton"].run(*args)
    assert loss.isnan()


@each_backend
def test_second_derivative_is_right_or_refused(backend: str):
    q_taken, values = (tensor.detach().to(wide(backend)).requires_grad_() for tensor in inputs())
    loss, _ = preference_loss(q_taken, values, two_pairs(), CONFIG, backend)
    (gradient,) = torch.autograd.grad(loss, q_taken, create_graph=True)
    if backend in FUSED_BACKENDS:
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()
    else:
        gradient.square().sum().backward()
        assert (q_taken.grad != 0).any()


WIDE_DTYPES = [(name, dtype) for name in BACKENDS for dtype in (torch.float32, float64) if serves(name, dtype)]


@pytest.mark.parametrize(("backend", "dtype"), WIDE_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_accuracy(scale: float, backend: str, dtype: torch.dtype):
    """Loss, gradients and metrics; branches longer than a block of any kernel, margins from near 0 to far out."""

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        q_taken, values, pairs = random_batch([(3, 2), (1, 1), (700, 1300), (4, 4)])
        q_taken, values = ((scale * x).to(dtype).requires_grad_() for x in (q_taken, values))
        pairs = dataclasses.replace(pairs, value_rows=torch.where(pairs.value_rows % 7 == 0, -1, pairs.value_rows))
        loss, metrics = preference_loss(q_taken, values, pairs, CONFIG, backend)
        loss.backward()
        return {"loss": loss.detach(), "dq": q_taken.grad, "dv": values.grad, **metrics}

    results = run(backend, dtype), run("eager", dtype), run("eager", float64)
    for name in results[0]:
        assert_close_to_truth(*(result[name] for result in results), name=name, dtype=dtype)


@pytest.mark.parametrize(("backend", "dtype"), WIDE_DTYPES, ids=str)
def test_twice_gives_the_same_bits(backend: str, dtype: torch.dtype, poisoned_memory: None):
    q_taken, values = inputs(dtype)
    loss, metrics = preference_loss(q_taken, values, two_pairs(), CONFIG, backend)
    again, _ = preference_loss(q_taken, values, two_pairs(), CONFIG, backend)
    assert torch.equal(loss, again) and loss.dtype == dtype
    assert {metric.dtype for metric in metrics.values()} == {dtype}
    first, second = (torch.autograd.grad(loss, (q_taken, values), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_float64_backend
def test_no_device_sync(backend: str):
    q_taken, values = (tensor.detach().to("meta").requires_grad_() for tensor in inputs())
    loss, metrics = preference_loss(q_taken, values, two_pairs("meta"), CONFIG, backend)
    loss.backward()
    assert loss.shape == () and {metric.shape for metric in metrics.values()} == {(2,)}


ERRORS: list[tuple[str, Any, str]] = [
    ("q_taken", torch.zeros(5), r"q_taken has shape \(5,\); expected \(M,\) = \(6,\)"),
    ("q_taken", torch.zeros(6, 1), r"q_taken has shape \(6, 1\)"),
    ("q_taken", torch.zeros(6, dtype=torch.bfloat16), r"q_taken is torch\.bfloat16.*float32"),
    ("q_taken", torch.zeros(6, dtype=float64), r"q_taken is torch\.float64, values torch\.float32"),
    ("values", torch.zeros(4, 1), r"values has shape \(4, 1\); expected \(S,\)"),
    ("values", torch.zeros(4, device="meta"), "values is on meta, q_taken on cpu"),
    ("backend", "jax", "backend='jax' is not one of 'auto'"),
]
# The same for the fields of `pairs`: a wrong size or place of any of them.
PAIRS_ERRORS: list[tuple[str, Tensor, str]] = [
    ("value_rows", torch.zeros(6, dtype=torch.int64, device="meta"), "on meta, q_taken on cpu"),
    ("value_rows", torch.zeros(6), "value_rows.*float32"),
    ("value_rows", torch.full((6, 1), -1), r"value_rows has shape \(6, 1\); expected \(M,\) = \(6,\)"),
    ("value_rows", torch.tensor([0, 1, 2, 3, 4, -1]), r"value_rows: row 4 is outside values \[0, 4\)"),
    ("branch_ends", torch.tensor([0, 2, 3, 4, 7]), r"branch_ends=\[0, 2, 3, 4, 7\] does not rise from 0 to M = 6"),
    ("branch_ends", torch.tensor([0, 4, 3, 4, 6]), r"branch_ends=\[0, 4, 3, 4, 6\] does not rise"),
    ("branch_ends", torch.tensor([1, 2, 3, 4, 6]), r"branch_ends=\[1, 2, 3, 4, 6\] does not rise"),
    ("divisor", torch.ones(2, requires_grad=True), r"divisor.requires_grad=True"),
    ("branch_ends", torch.tensor([0, 2, 3, 4]), r"branch_ends.*\(4,\).*\(5,\)"),
    ("branch_ends", torch.tensor([0, 2, 3, 4, 6], device="meta"), "branch_ends.* on meta, q_taken on cpu"),
    ("divisor", torch.ones(2, 1), r"divisor.*\(2, 1\)"),
    ("divisor", torch.ones(2, device="meta"), "divisor.* on meta, q_taken on cpu"),
    ("squares_divisor", torch.ones(1), r"squares_divisor.*\(1,\).*\(2,\)"),
    ("squares_divisor", torch.ones(2, device="meta"), "squares_divisor.* on meta, q_taken on cpu"),
]


@pytest.mark.parametrize(("argument", "value", "message"), ERRORS)
def test_illegal_argument_is_named(argument: str, value: Any, message: str):
    arguments = {"q_taken": torch.zeros(6), "values": torch.zeros(4), "pairs": two_pairs(), "config": CONFIG}
    with pytest.raises(ValueError, match=message) as caught:
        ops.preference_loss(**{**arguments, argument: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value", "message"), PAIRS_ERRORS)
def test_illegal_field_of_pairs_is_named(field: str, value: Tensor, message: str):
    pairs = dataclasses.replace(two_pairs(), **{field: value})
    with pytest.raises(ValueError, match=message):
        ops.preference_loss(torch.zeros(6), torch.zeros(4), pairs, CONFIG)


def test_no_pairs_is_an_error():
    """A mean over nothing is no number, so it is refused rather than NaN."""
    nothing = torch.zeros(0)
    pairs = Pairs(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), nothing, nothing)
    with pytest.raises(ValueError, match="pairs holds 0 pairs"):
        ops.preference_loss(nothing, nothing, pairs, CONFIG)
