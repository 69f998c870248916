"""When the native CPU kernels serve a call, and what a user is told when they do not."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastqadapter import ops
from fastqadapter_kernels import cpu, native
from soft_value_problem import problem

backends = importlib.import_module("fastqadapter.ops.backends")  # the package has the function under this name
needs_library = pytest.mark.skipif(native.native_library() is None, reason="no native library: no C++ compiler found")


def soft_value(backend: str, **changes: Any) -> torch.Tensor:
    case = problem(dtype=torch.float32)
    arguments = {"hidden_q": case.hidden_q, "hidden_b": case.hidden_b, "weight": case.weight, **case.options}
    return ops.soft_value(**{**arguments, **changes}, backend=backend)


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """The library is looked for anew, in the test and after it."""
    native.native_library.cache_clear()
    yield
    native.native_library.cache_clear()


@needs_library
def test_auto_takes_them_for_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FASTQADAPTER_BACKEND", raising=False)
    assert ops.backends()["cpu"] is None
    assert torch.equal(soft_value("auto"), soft_value("cpu"))
    assert not torch.equal(soft_value("auto"), soft_value("torch"))  # or the line above says nothing


@needs_library
@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "its kernels compute in float32, not in torch.float64"),
        (torch.zeros(2, 3, device="meta"), "it needs tensors on the CPU, these are on meta"),
    ],
    ids=["float64", "meta"],
)
def test_other_tensors_are_refused_by_name(tensor: torch.Tensor, reason: str):
    with pytest.raises(ValueError, match=f"backend='cpu' cannot serve residual_log_probs: {reason}"):
        ops.residual_log_probs(tensor, tensor, alpha_0=1.0, alpha_tilde=1.0, backend="cpu")


@needs_library
def test_other_differentiation_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    """The kernels have a backward pass alone; without a word they would pass for constants. `auto` goes on."""
    hidden_q = problem(dtype=torch.float32).hidden_q
    with pytest.raises(ValueError, match="backend='cpu' cannot serve soft_value: it has no torch.func transforms"):
        torch.func.grad(lambda q: soft_value("cpu", hidden_q=q).sum())(hidden_q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden_q, torch.ones_like(hidden_q))
        with pytest.raises(ValueError, match="it has no forward-mode derivative"):
            soft_value("cpu", hidden_q=dual)
    monkeypatch.delenv("FASTQADAPTER_BACKEND", raising=False)
    gradient = torch.func.grad(lambda q: soft_value("auto", hidden_q=q).sum())(hidden_q)
    assert torch.equal(gradient, torch.func.grad(lambda q: soft_value("eager", hidden_q=q).sum())(hidden_q))


def test_missing_library_is_refused_by_name_and_auto_goes_on(
    monkeypatch: pytest.MonkeyPatch, fresh_library: None, caplog: pytest.LogCaptureFixture
):
    monkeypatch.delenv("FASTQADAPTER_BACKEND", raising=False)
    monkeypatch.setattr(native, "library_path", lambda: None)
    caplog.set_level(logging.INFO, logger="fastqadapter")
    backends._log_refusal_once.cache_clear()
    reason = "its native library is missing or cannot be used: `fastqadapter env` says what to do"
    assert ops.backends()["cpu"] == reason
    with pytest.raises(ValueError, match=f"backend='cpu' cannot serve soft_value: {reason}"):
        soft_value("cpu")
    assert torch.equal(soft_value("auto"), soft_value("torch"))
    assert f"soft_value: backend 'cpu' passed over: {reason}" in [record.getMessage() for record in caplog.records]
    with pytest.raises(RuntimeError, match="the native CPU library is missing"):
        cpu.taken_value(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64))


@needs_library
def test_library_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, fresh_library: None, caplog: pytest.LogCaptureFixture
):
    """An editable install whose sources went on without it: its structs would be read wrongly."""
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert native.native_library() is None and native.cpu_isa() == "none"
    assert "was built from other sources" in caplog.text and "run pip install again" in caplog.text


def test_unknown_instruction_set_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTQADAPTER_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="cannot serve soft_value: FASTQADAPTER_CPU_ISA='sse9' is not one of generic"):
        soft_value("cpu")
    with pytest.raises(ValueError, match="isa='sse9' is not one of generic, avx2, avx512, avx512_bf16"):
        native.set_cpu_isa("sse9")
