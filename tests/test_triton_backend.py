"""When the Triton kernels serve a call: refusals with their reason, and the try before `auto` relies on them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from backend_cases import device_of
from fastqadapter import ops
from soft_value_problem import problem

pytest.importorskip("triton", reason="Triton is not installed")
from fastqadapter.ops.fused import first_use  # noqa: E402
from fastqadapter_kernels.triton import device, launchers  # noqa: E402

backends = importlib.import_module("fastqadapter.ops.backends")  # the package has the function under this name
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DEVICE = torch.device(device_of("triton"))


def soft_value(backend: str, **changes: Any) -> torch.Tensor:
    case = problem(dtype=torch.float32).to(DEVICE)
    arguments = {"hidden_q": case.hidden_q, "hidden_b": case.hidden_b, "weight": case.weight, **case.options}
    return ops.soft_value(**{**arguments, **changes}, backend=backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not interpreted")
def test_cpu_tensors_are_refused_by_name_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    assert soft_value("triton").shape == (5,)
    monkeypatch.setattr(device, "INTERPRETED", False)
    with pytest.raises(ValueError, match="cannot serve soft_value: it needs tensors on a CUDA or ROCm GPU, .* cpu"):
        soft_value("triton")
    assert ops.backends()["triton"] == "no CUDA or ROCm GPU is available"


def test_float64_is_refused_by_name():
    case = problem()
    with pytest.raises(ValueError, match="its kernels compute in float32, not in torch.float64"):
        ops.soft_value(case.hidden_q, case.hidden_b, case.weight, **case.options, backend="triton")


def test_meta_tensors_are_refused_by_name():
    logits = torch.zeros(2, 3, device="meta")
    with pytest.raises(ValueError, match="these are on meta"):
        ops.residual_soft_value(logits, logits, alpha_0=1.0, alpha_tilde=1.0, backend="triton")


def test_other_differentiation_is_refused_by_name():
    """The kernels have a backward pass alone; without a word they would pass for constants. `auto` goes on."""
    hidden_q = problem(dtype=torch.float32).hidden_q.to(DEVICE)

    def value(backend: str) -> Any:
        return lambda q: soft_value(backend, hidden_q=q).sum()

    with pytest.raises(ValueError, match="cannot serve soft_value: it has no torch.func transforms"):
        torch.func.grad(value("triton"))(hidden_q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden_q, torch.ones_like(hidden_q))
        with pytest.raises(ValueError, match="it has no forward-mode derivative"):
            value("triton")(dual)


def test_absent_triton_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_TRITON_IS_INSTALLED", False)
    with pytest.raises(ValueError, match="cannot serve soft_value: Triton is not installed"):
        soft_value("triton")
    assert ops.backends()["triton"] == "Triton is not installed"
    assert soft_value("auto").shape == (5,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not interpreted")
def test_auto_never_interprets(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="fastqadapter")
    backends._log_refusal_once.cache_clear()
    soft_value("auto")
    message = caplog.records[0].getMessage()
    assert "soft_value: backend 'triton' passed over: on CPU tensors it runs under Triton's" in message


# --- the first use on a device ----------------------------------------------------------------------------------------


@pytest.fixture
def small_try(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sizes that the interpreter takes a second for."""
    for name, size in (("ROWS", 9), ("SIZE", 40), ("VOCAB", 70)):
        monkeypatch.setattr(first_use, name, size)
    first_use.failure.cache_clear()
    yield
    first_use.failure.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", first_use._TRIES)
def test_every_op_passes_its_try(op: str, dtype: torch.dtype, small_try: None):
    assert first_use.failure(op, DEVICE, dtype) is None


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast(DEVICE.type, torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["inference_mode", "no_grad", "autocast", "default device"],
)
def test_context_of_the_first_call_does_not_decide(context: Any, small_try: None):
    """An evaluation before training must not switch the kernels off for the whole process."""
    with context():
        assert first_use.failure("soft_value", DEVICE, torch.float32) is None
        assert first_use.failure("preference_loss", DEVICE, torch.float32) is None


def test_every_op_has_a_try():
    modules = {op for op in ops.__all__ if op not in ("HeadParams", "Pairs", "backends")}
    assert set(first_use._TRIES) == modules


def test_kernel_that_computes_something_else_is_passed_over(
    small_try: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    right = launchers.soft_value_lse

    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        value, lse = right(*args)
        return value * 1.02, lse

    monkeypatch.setattr(launchers, "soft_value_lse", wrong)
    for _ in range(2):
        reason = first_use.failure("soft_value", DEVICE, torch.float32)
        assert reason is not None and "AssertionError: result 0" in reason and "\n" not in reason
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "soft_value: the Triton kernels are not used" in warnings[0].getMessage()


def test_kernel_that_does_not_compile_is_passed_over(small_try: None, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any) -> None:
        raise RuntimeError("PassManager::run failed\nwith many lines")

    monkeypatch.setattr(launchers, "taken_value", broken)
    assert first_use.failure("taken_value", DEVICE, torch.bfloat16) == (
        f"its first use on {DEVICE} failed: RuntimeError: PassManager::run failed"
    )


def test_auto_serves_what_the_try_allows(monkeypatch: pytest.MonkeyPatch):
    """On a GPU `auto` asks for the try of the op; that is all that decides."""
    asked = []

    def failure(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        asked.append((op, device.type, dtype))
        return None if dtype == torch.bfloat16 else "it failed"

    monkeypatch.setattr(first_use, "failure", failure)
    implementation = backends.fused_implementations("an_op", print)["triton"]
    for dtype in (torch.bfloat16, torch.float16):
        on_gpu = torch.empty(2, 3, dtype=dtype, device="meta")
        monkeypatch.setattr(backends, "_tensors", lambda args: iter([_OnGpu(args[0])]))
        assert implementation.auto_refusal(on_gpu) == (None if dtype == torch.bfloat16 else "it failed")
    assert asked == [("an_op", "cuda", torch.bfloat16), ("an_op", "cuda", torch.float16)]


class _OnGpu:
    """What the decision looks at, of a tensor that this machine cannot hold."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device, self.dtype = torch.device("cuda", 0), tensor.dtype
