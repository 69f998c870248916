"""The tolerance helper itself: it must let through what it should, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastqadapter.testing import EPS, assert_close_to_truth

TRUTH = torch.tensor([[4.0, -2.0], [1.0, 0.0]], dtype=torch.float64)


def moved(entry: tuple[int, int], by: float) -> Tensor:
    """The truth with one entry moved `by` this part of the largest entry."""
    result = TRUTH.clone()
    result[entry] += 4.0 * by
    return result


@pytest.mark.parametrize("dtype", EPS)
def test_error_up_to_twice_that_of_eager_passes_and_more_fails(dtype: torch.dtype):
    eager_error = 10 * EPS[dtype]
    eager = moved((0, 1), -eager_error)
    assert_close_to_truth(moved((1, 1), 20.9 * EPS[dtype]), eager, TRUTH, name="x", dtype=dtype)
    with pytest.raises(AssertionError):
        assert_close_to_truth(moved((1, 1), 21.1 * EPS[dtype]), eager, TRUTH, name="x", dtype=dtype)


def test_dtype_is_that_of_the_result_unless_given():
    result = moved((1, 0), EPS[torch.bfloat16] / 2).float()
    with pytest.raises(AssertionError, match="float32"):
        assert_close_to_truth(result, TRUTH, TRUTH, name="x")
    assert_close_to_truth(result, TRUTH, TRUTH, name="x", dtype=torch.bfloat16)


def test_message_names_the_worst_entry():
    with pytest.raises(AssertionError, match=r"the value: entry \(1, 0\) is 3, truth 1: relative error 0\.5 > "):
        assert_close_to_truth(moved((1, 0), 0.5), TRUTH, TRUTH, name="the value")


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_special_values_must_stand_where_the_truth_has_them(special: float):
    truth = TRUTH.clone()
    truth[0, 1] = special
    assert_close_to_truth(truth.clone(), TRUTH, truth, name="x")
    for wrong in {0.0, math.nan, math.inf, -math.inf} - {special}:
        result = truth.clone()
        result[0, 1] = wrong
        if not (math.isnan(wrong) and math.isnan(special)):
            with pytest.raises(AssertionError, match=r"\(0, 1\)"):
                assert_close_to_truth(result, truth, truth, name="x")
    with pytest.raises(AssertionError, match=r"\(0, 1\)"):  # and nowhere else
        assert_close_to_truth(truth, truth, TRUTH, name="x")


def test_overflow_of_eager_does_not_widen_the_tolerance():
    with pytest.raises(AssertionError):
        assert_close_to_truth(moved((0, 0), 0.1), TRUTH / 0.0, TRUTH, name="x")


def test_zero_truth_is_compared_absolutely():
    zeros = torch.zeros(3, dtype=torch.float64)
    assert_close_to_truth(zeros + EPS[torch.float32] / 2, zeros, zeros, name="x", dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_close_to_truth(zeros + 2 * EPS[torch.float32], zeros, zeros, name="x", dtype=torch.float32)


def test_empty_and_scalar_tensors():
    empty, scalar = torch.zeros(0, 3, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    assert_close_to_truth(empty, empty, empty, name="x")
    with pytest.raises(AssertionError, match=r"entry \(\)"):
        assert_close_to_truth(scalar + 1, scalar, scalar, name="x")


def test_shapes_and_truth_dtype_must_fit():
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close_to_truth(TRUTH[:1], TRUTH, TRUTH, name="x")
    with pytest.raises(AssertionError, match="not torch.float64"):
        assert_close_to_truth(TRUTH, TRUTH, TRUTH.float(), name="x")
