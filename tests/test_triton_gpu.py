"""The Triton kernels on a GPU, at real sizes. On the CPU the same kernels run under the interpreter at small ones:
tests/test_triton_kernels.py, and every test of the ops with backend `triton`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastqadapter import ops
from fastqadapter.testing import assert_close_to_truth
from soft_value_problem import Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")

SHAPES = {  # hidden size, vocabulary, options of the head
    "Llama-3-8B": (4096, 128256, {}),
    "Qwen2.5-0.5B": (896, 151936, {}),
    "Gemma-2-2B": (2304, 256000, {"softcap": 30.0, "difference": True}),
    "SmolLM2-135M": (576, 49152, {}),
    "odd": (1000, 50257, {}),
}
ROWS = 700  # several chunks of the scratch for the largest vocabularies
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def problem(shape: str, dtype: torch.dtype, rows: int = ROWS) -> Problem:
    size, vocab, options = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)
    hidden_b, hidden_q = torch.randn(2, rows, size, generator=generator, device="cuda").to(dtype).unbind()
    if not options.get("difference"):
        hidden_q = 0.1 * hidden_q
    weight = (torch.randn(vocab, size, generator=generator, device="cuda") * 2 / size**0.5).to(dtype)
    weight[:7] = (6 * hidden_b[:7].float() / size**0.5).to(dtype)  # rows that are nearly certain
    return Problem(hidden_q, hidden_b, weight, {"alpha_0": 0.9, "alpha_tilde": 0.7, **options})


def some_rows(case: Problem, rows: Tensor) -> Problem:
    return Problem(case.hidden_q[rows], case.hidden_b[rows], case.weight, case.options)


@each_shape
@each_dtype
def test_soft_value_at_real_sizes(shape: str, dtype: torch.dtype):
    """All rows at once; a sample of them is compared with eager, whose logits fit the memory."""
    case = problem(shape, dtype)
    sample = torch.tensor([0, 3, 6, 7, 300, ROWS - 1], device="cuda")
    value, lse, _ = case.run("triton")
    hidden_q = case.hidden_q.detach().requires_grad_()
    Problem(hidden_q, case.hidden_b, case.weight, case.options).value("triton")[0].sum().backward()
    assert hidden_q.grad is not None
    actual = [value[sample], lse[sample], hidden_q.grad[sample]]

    def eager(case: Problem) -> list[Tensor]:
        q = case.hidden_q.detach().requires_grad_()
        value, lse = Problem(q, case.hidden_b, case.weight, case.options).value("eager")
        return [value.detach(), lse, torch.autograd.grad(value.sum(), q)[0]]

    few = some_rows(case, sample)
    same, truth = eager(few), eager(few.to(torch.float64))
    for name, *three in zip(("v", "base_lse", "dv/dd"), actual, same, truth, strict=True):
        assert_close_to_truth(*three, name=name, dtype=dtype)
    for name, *three in zip(("v", "base_lse"), case.value("triton"), same, truth, strict=False):
        assert_close_to_truth(three[0][sample], *three[1:], name=f"{name} without gradient", dtype=dtype)


@each_shape
def test_two_runs_give_the_same_bits(shape: str):
    case = problem(shape, torch.bfloat16)
    first, second = case.run("triton"), case.run("triton")
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, case.value("triton"), case.value("triton")))


@each_shape
def test_peak_memory(shape: str):
    """Beside its results: 256 MiB of scores in training, 16 MiB without gradient; the logits would be gigabytes."""
    case = problem(shape, torch.bfloat16, rows=4096)
    size = case.weight.shape[1]
    hidden_q = case.hidden_q.detach().requires_grad_()
    for trained, budget in (
        (hidden_q, (256 << 20) + 6 * 4096 * size * 4),
        (case.hidden_q, 16 << 20),
    ):
        with_gradient = Problem(trained, case.hidden_b, case.weight, case.options)
        with_gradient.value("triton")  # compiles, and lets cuBLAS take its workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with_gradient.value("triton")
        assert torch.cuda.max_memory_allocated() - before <= budget


def test_no_host_sync():
    """Forward and backward of everything that a training step calls."""
    case = problem("SmolLM2-135M", torch.bfloat16)
    states = torch.arange(ROWS, device="cuda").repeat_interleave(2)
    actions = states % 1000
    ends = torch.tensor([0, ROWS // 2, ROWS, 3 * ROWS // 2, 2 * ROWS], device="cuda")
    pairs = ops.Pairs(states, ends, *torch.ones(2, 2, device="cuda"))
    config = SimpleNamespace(gamma=1.0, beta=0.1)

    def step() -> None:
        hidden_q = case.hidden_q.detach().requires_grad_()
        value, _, taken = ops.state_action_values(
            hidden_q, case.hidden_b, case.weight, ops.HeadParams(0.9, 0.7), states, actions, backend="triton"
        )
        loss, _ = ops.preference_loss(taken, value, pairs, config, backend="triton")
        loss.backward()
        case.value("triton")

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("vocab", [507, 32000, 50257, 128256, 262144])
@each_dtype
def test_residual_at_real_sizes(vocab: int, dtype: torch.dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(2, 300, vocab, generator=generator, device="cuda")).to(dtype)
    for op in (ops.residual_log_probs, ops.residual_soft_value):

        def run(backend: str, q: Tensor, b: Tensor, op: object = op) -> list[Tensor]:
            q = q.detach().requires_grad_()
            result = op(q, b, alpha_0=0.9, alpha_tilde=0.7, backend=backend)  # type: ignore[operator]
            # The gradient of a likely action is near the sum over its row, which must be a number in fp16 too.
            upstream = torch.linspace(-1, 2, result.numel(), device="cuda").view_as(result).to(result.dtype) / 16
            return [result.detach(), torch.autograd.grad((result * upstream).sum(), q)[0]]

        truth = run("eager", *logits.double())
        for name, *three in zip(
            ("result", "gradient"), run("triton", *logits), run("eager", *logits), truth, strict=True
        ):
            assert_close_to_truth(*three, name=name, dtype=dtype)


def test_auto_takes_the_kernels():
    """The try of every op on this device passes, so `auto` uses what the tests above check."""
    from fastqadapter.ops.fused import first_use

    for op in first_use._TRIES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert first_use.failure(op, torch.device("cuda", 0), dtype) is None


def test_cpu_tensors_are_refused():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="it needs tensors on a CUDA or ROCm GPU, these are on cpu"):
        ops.residual_soft_value(logits, logits, alpha_0=1.0, alpha_tilde=1.0, backend="triton")
