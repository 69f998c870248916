"""Which backend serves a call, and what a user is told when none does."""

from __future__ import annotations

import logging

import pytest
import torch

from fastqadapter import ops
from fastqadapter.ops.backends import BACKENDS, Implementation, choose


def fast(size: int) -> str:
    return "fast"


def plain(size: int) -> str:
    return "plain"


IMPLEMENTATIONS = {
    "triton": Implementation(
        fast, refusal=lambda size: None if size % 16 == 0 else f"size {size} is no multiple of 16"
    ),
    "eager": Implementation(plain),
}


@pytest.fixture(autouse=True)
def no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTQADAPTER_BACKEND", raising=False)


def test_auto_takes_the_first_that_can_serve():
    assert choose("an_op", IMPLEMENTATIONS, "auto", 32) is fast
    assert choose("an_op", IMPLEMENTATIONS, "auto", 33) is plain


def test_auto_logs_each_refusal_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, logger="fastqadapter")
    for size in (17, 17, 19):
        choose("logged_op", IMPLEMENTATIONS, "auto", size)
    assert [record.getMessage() for record in caplog.records] == [
        "logged_op: backend 'triton' passed over: size 17 is no multiple of 16",
        "logged_op: backend 'triton' passed over: size 19 is no multiple of 16",
    ]


def test_auto_without_any_that_can_serve():
    with pytest.raises(ValueError, match="no backend can serve this call of an_op"):
        choose("an_op", {"triton": IMPLEMENTATIONS["triton"]}, "auto", 3)


def test_named_backend_serves_or_raises_with_its_reason():
    assert choose("an_op", IMPLEMENTATIONS, "eager", 32) is plain
    with pytest.raises(ValueError, match="backend='triton' cannot serve an_op: size 3 is no multiple of 16"):
        choose("an_op", IMPLEMENTATIONS, "triton", 3)
    with pytest.raises(ValueError, match="backend='torch' cannot serve an_op: it has no an_op"):
        choose("an_op", IMPLEMENTATIONS, "torch", 32)


@pytest.mark.parametrize("name", ["", "Triton", "cuda", None])
def test_unknown_backend_is_named_beside_the_known_ones(name: str):
    with pytest.raises(ValueError, match="is not one of 'auto', 'triton', 'cpu', 'torch', 'eager'") as caught:
        choose("an_op", IMPLEMENTATIONS, name, 32)
    assert repr(name) in str(caught.value)


def test_environment_variable_sets_the_default_and_nothing_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTQADAPTER_BACKEND", "eager")
    assert choose("an_op", IMPLEMENTATIONS, "auto", 32) is plain
    assert choose("an_op", IMPLEMENTATIONS, "triton", 32) is fast
    monkeypatch.setenv("FASTQADAPTER_BACKEND", "triton")
    with pytest.raises(ValueError, match="size 3"):  # named, so no other takes its place
        choose("an_op", IMPLEMENTATIONS, "auto", 3)
    for unset in ("", "auto"):
        monkeypatch.setenv("FASTQADAPTER_BACKEND", unset)
        assert choose("an_op", IMPLEMENTATIONS, "auto", 3) is plain


def test_wrong_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTQADAPTER_BACKEND", "fastest")
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="'fastest' is not one of") as caught:
        ops.residual_soft_value(logits, logits, alpha_0=1.0, alpha_tilde=1.0)
    assert "FASTQADAPTER_BACKEND" in str(caught.value)
    assert ops.residual_soft_value(logits, logits, alpha_0=1.0, alpha_tilde=1.0, backend="eager").shape == (2,)


def test_report_of_all_backends():
    report = ops.backends()
    assert tuple(report) == BACKENDS
    assert report["torch"] is None and report["eager"] is None
    assert all(reason is None or reason for reason in report.values())
