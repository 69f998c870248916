"""Accuracy of the fast backends of `ops.soft_value` against eager in the same dtype and in float64."""

from __future__ import annotations

import dataclasses
import importlib
from math import inf, nan

import pytest
import torch
from torch import Tensor

from backend_cases import FAST_BACKENDS, each_fast_backend_and_dtype, wide
from fastqadapter.testing import assert_close_to_truth
from soft_value_problem import Problem, head_options, problem

pytestmark = pytest.mark.usefixtures("small_tiles")


def check(backend: str, case: Problem, dtype: torch.dtype) -> None:
    """The form with gradient and the one without."""
    actual, eager, truth = case.run(backend), case.run("eager"), case.to(torch.float64).run("eager")
    for name, *three in zip(("v", "base_lse", "dv/dd"), actual, eager, truth, strict=True):
        assert_close_to_truth(*three, name=name, dtype=dtype)
    for name, *three in zip(("v", "base_lse"), case.value(backend), eager[:2], truth[:2], strict=True):
        assert_close_to_truth(*three, name=f"{name} without gradient", dtype=dtype)


@each_fast_backend_and_dtype
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
@head_options
def test_accuracy_of_each_head(head: str, cached: bool, backend: str, dtype: torch.dtype):
    lse = torch.linspace(3.0, 5.0, 5).to(dtype).to(torch.float32) if cached else None
    check(backend, problem(head, dtype=dtype, base_lse=lse), dtype)


@each_fast_backend_and_dtype
@pytest.mark.parametrize("alpha_tilde", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("alpha_0", [0.0, 0.01, 1.0, 5.0])
@pytest.mark.parametrize("head", ["scale and biases", "softcap of all"])
def test_accuracy_of_each_alpha(head: str, alpha_0: float, alpha_tilde: float, backend: str, dtype: torch.dtype):
    check(backend, problem(head, dtype=dtype, alpha_0=alpha_0, alpha_tilde=alpha_tilde), dtype)


@each_fast_backend_and_dtype
@pytest.mark.parametrize(("rows", "vocab", "size"), [(1, 507, 123), (1, 1, 1), (3, 16, 8), (4, 17, 1), (7, 2, 33)])
def test_accuracy_of_ragged_shapes(rows: int, vocab: int, size: int, backend: str, dtype: torch.dtype):
    check(backend, problem("scale and biases", rows, vocab, size, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("part", [0.1, 0.01])
@pytest.mark.parametrize("head", ["plain", "bias", "softcap of all"])
def test_accuracy_where_training_starts(head: str, part: float, backend: str, dtype: torch.dtype):
    """The residual is far smaller than the base state, and so is `v`: no rounding of the base logits may drown it."""
    case = problem(head, rows=5, vocab=507, size=123, dtype=dtype, alpha_0=1.0, alpha_tilde=1.0)
    options = {**case.options, "bias_q": None}  # the bias cancels in a difference head
    hidden_q = case.hidden_b * (1 + part) if options.get("difference") else case.hidden_q * part
    check(backend, dataclasses.replace(case, hidden_q=hidden_q, options=options), dtype)


@each_fast_backend_and_dtype
@pytest.mark.parametrize("alpha_tilde", [0.05, 1.0])
def test_accuracy_with_planted_structure(alpha_tilde: float, backend: str, dtype: torch.dtype):
    """One token of the last tile takes nearly all of the probability; two share it; rows of W repeat."""
    case = problem(rows=4, vocab=40, size=8, dtype=dtype, alpha_tilde=alpha_tilde)
    weight = case.weight.clone()
    weight[16:32] = weight[:16]  # the second tile is the first again
    weight[35] = 4 * case.hidden_b[0]
    weight[3] = weight[38] = 4 * case.hidden_b[1]
    check(backend, dataclasses.replace(case, weight=weight), dtype)


@each_fast_backend_and_dtype
@pytest.mark.parametrize("alpha_tilde", [0.05, 1.0, 20.0])
def test_extreme_logits(alpha_tilde: float, backend: str, dtype: torch.dtype):
    """Logits of 1e4, which no exponential survives and float16 still holds."""
    case = problem(rows=4, vocab=40, size=8, dtype=dtype, alpha_0=1.0, alpha_tilde=alpha_tilde)
    scale = 1e4 / (case.hidden_b.double() @ case.weight.double().T).abs().max().item()
    check(backend, dataclasses.replace(case, hidden_q=case.hidden_q * scale, hidden_b=case.hidden_b * scale), dtype)


@each_fast_backend_and_dtype
def test_large_embeddings_of_a_flat_policy(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """A tile of 4096 equally likely tokens with embeddings of 20: `e` is 20, though their plain sum is not in fp16."""
    weight, hidden = torch.full((4096, 2), 20.0, dtype=dtype), torch.zeros(1, 2, dtype=dtype)
    monkeypatch.setattr(importlib.import_module("fastqadapter.ops.soft_value"), "VOCAB_TILE", 4096)
    check(backend, Problem(hidden, hidden, weight, {"alpha_0": 1.0, "alpha_tilde": 1.0}), dtype)


@each_fast_backend_and_dtype
@pytest.mark.parametrize("masked", [slice(5, 9), slice(0, 16), slice(16, 37), slice(0, 36)], ids=str)
@pytest.mark.parametrize("logits_head", [False, True])
def test_masked_vocabulary(logits_head: bool, masked: slice, backend: str, dtype: torch.dtype):
    """A bias of -inf takes tokens away, be it a whole tile or all but one token."""
    case = problem(dtype=dtype, bias=True, bias_q=True if logits_head else None, logit_scale=0.4)
    for name in ("bias", "bias_q") if logits_head else ("bias",):
        case.options[name][masked] = -inf
    assert case.run(backend)[0].isfinite().all()
    check(backend, case, dtype)


@each_fast_backend_and_dtype
@head_options
def test_strided_inputs(head: str, backend: str, dtype: torch.dtype):
    """Every other column of a matrix of NaN, one row expanded, a transposed head."""
    case = problem(head, dtype=dtype)
    case = dataclasses.replace(case, hidden_b=case.hidden_b[:1].repeat(5, 1))
    strided = Problem(
        hidden_q=torch.stack([case.hidden_q, case.hidden_q * nan], dim=-1).flatten(1)[:, ::2],
        hidden_b=case.hidden_b[:1].expand(5, -1),
        weight=case.weight.T.contiguous().T,
        options={k: x.repeat_interleave(2)[::2] if isinstance(x, Tensor) else x for k, x in case.options.items()},
    )
    assert not strided.hidden_q.is_contiguous() and not strided.weight.is_contiguous()
    truth = case.to(torch.float64).run("eager")
    for name, *three in zip(("v", "lse", "dv/dd"), strided.run(backend), case.run("eager"), truth, strict=True):
        assert_close_to_truth(*three, name=name, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@head_options
def test_fp32_states_on_a_16_bit_head(head: str, backend: str, dtype: torch.dtype):
    case = problem(head, vocab=507, size=123, dtype=torch.float32)
    case = dataclasses.replace(case, weight=case.weight.to(dtype))
    assert case.run(backend)[0].dtype == torch.float32
    check(backend, case, dtype)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@head_options
def test_uninitialised_memory_is_never_read(head: str, backend: str, poisoned_memory: None):
    check(backend, problem(head, dtype=wide(backend)), wide(backend))
