"""What the tests of the ops do not reach: the launchers of the Triton kernels with every configuration, their memory,
offsets beyond 2^31, precision of fp32, and where they are launched."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from allocations import LargestAllocation
from backend_cases import device_of
from fastqadapter.testing import assert_close_to_truth
from operator_calls import head_arguments, operator_calls
from soft_value_problem import Problem, head_options, problem

pytest.importorskip("triton", reason="Triton is not installed")
from fastqadapter.ops.fused.soft_value import transitions_of_states  # noqa: E402
from fastqadapter_kernels.triton import online  # noqa: E402
from fastqadapter_kernels.triton import residual as residual_kernels  # noqa: E402
from fastqadapter_kernels.triton import soft_value as scratch_kernels  # noqa: E402
from fastqadapter_kernels.triton import taken_value as taken_kernels  # noqa: E402
from fastqadapter_kernels.triton.device import Hardware  # noqa: E402
from fastqadapter_kernels.triton.soft_value import RowConfig, soft_value_and_gradient  # noqa: E402
from fastqadapter_kernels.triton.soft_value_lse import LseConfig, soft_value_lse  # noqa: E402

DEVICE = device_of("triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def launcher_arguments(case: Problem, base_lse: Tensor | None = None) -> tuple[Any, ...]:
    return head_arguments(case.to(DEVICE), base_lse)


def check(case: Problem, *results: Tensor) -> None:
    """(v, lse) or (v, lse, e) of a launcher against eager."""

    def eager(case: Problem) -> tuple[Tensor, Tensor, Tensor]:
        hidden_q = case.hidden_q.detach().requires_grad_()
        value, lse = dataclasses.replace(case, hidden_q=hidden_q).value("eager")
        return value.detach(), lse, torch.autograd.grad(value.sum(), hidden_q)[0]

    truth = eager(case.to(torch.float64))
    for name, *three in zip(("v", "lse", "e"), results, eager(case), truth, strict=False):
        assert_close_to_truth(*three, name=name, dtype=case.weight.dtype)


# --- configurations ---------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    "config",
    [
        LseConfig(16, 16, 16, 4, 1),
        LseConfig(16, 64, 32, 4, 2, tma=True),
        LseConfig(64, 32, 64, 4, 3),
        LseConfig(32, 128, 16, 8, 1, tma=True),
    ],
    ids=str,
)
def test_every_tile_gives_the_same_lse(config: LseConfig, dtype: torch.dtype):
    """Several spans of the vocabulary and several blocks of rows, none of them full; D = 48 is full of 16 alone."""
    case = problem("softcap of all", rows=37, vocab=507, size=48, dtype=dtype)
    check(case, *soft_value_lse(*launcher_arguments(case), config=config))


@each_dtype
@pytest.mark.parametrize("config", [RowConfig(16, 1), RowConfig(64, 4), RowConfig(1024, 4)], ids=str)
@pytest.mark.parametrize("scratch_bytes", [1, 4000, 1 << 20])
def test_every_chunk_and_tile_gives_the_same_gradient(scratch_bytes: int, config: RowConfig, dtype: torch.dtype):
    """One row at a time, a few, or all: the budget is of bytes."""
    case = problem("softcap of all", rows=9, vocab=107, size=24, dtype=dtype)
    results = soft_value_and_gradient(*launcher_arguments(case), config=config, scratch_bytes=scratch_bytes)
    check(case, *results)


@each_dtype
def test_real_vocabulary(dtype: torch.dtype):
    """SmolLM2's 49152 tokens, in tiles as a GPU would take them."""
    case = problem("bias", rows=2, vocab=49152, size=64, dtype=dtype)
    check(case, *soft_value_lse(*launcher_arguments(case), config=LseConfig(64, 128, 64, 4, 3)))
    check(case, *soft_value_and_gradient(*launcher_arguments(case), config=RowConfig(2048, 8)))


@pytest.mark.parametrize("rows", [1, 64, 4096])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_rules_never_choose_plain_tf32_and_fill_the_device(arch: str, rows: int):
    hw = Hardware(arch, 100, 40 << 20)
    for dtype, both, aligned in itertools.product(DTYPES, (False, True), (False, True)):
        config = LseConfig.rule(hw, dtype, rows, both, aligned)
        assert config.precision in ("ieee", "tf32x3")
        assert not config.tma or (aligned and arch in ("sm_90", "sm_100"))
        span = config.tiles_per_span(hw, rows, 128256)
        programs = -(-rows // config.block_n) * -(-128256 // config.block_v)
        assert 1 <= span <= 16 and (span == 1 or programs / span >= 4 * hw.multiprocessors)


# --- the shift of the row kernel --------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("rise", [7.0, 12.0, 39.0, 45.0, 500.0, 3e4])
def test_scores_that_rise_from_tile_to_tile(rise: float, dtype: torch.dtype):
    """Each tile of 16 scores is higher than the one before: below the headroom the shift stays, above it is raised
    and what was written is scaled down. The first tile is -inf as a whole."""
    vocab = 80
    weight = torch.zeros(vocab, 2, dtype=torch.float64)
    weight[:, 0] = torch.arange(vocab).div(16, rounding_mode="floor") - 2.0
    weight[:, 1] = torch.linspace(-1, 1, vocab, dtype=torch.float64)
    bias = torch.zeros(vocab, dtype=torch.float64)
    bias[:16] = -torch.inf
    hidden_q = torch.tensor([[rise, 0.3], [-rise, 0.2], [0.0, 0.1]], dtype=torch.float64)
    options = {"alpha_0": 1.0, "alpha_tilde": 1.0, "bias": bias}
    case = Problem(hidden_q, torch.zeros_like(hidden_q), weight, options).to(dtype)
    check(case, *soft_value_and_gradient(*launcher_arguments(case), config=RowConfig(16, 1)))


# --- memory and products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cached", "softcap", "products"), [(False, None, 3), (True, None, 2), (True, 3.0, 3)])
def test_number_of_products(cached: bool, softcap: float | None, products: int):
    """Base lse, scores, expected embedding; with a given lse(b) one less, but for a soft-cap."""
    case = problem(rows=7, vocab=50, size=8, dtype=torch.float32, softcap=softcap)
    lse = torch.full((7,), 4.0, device=DEVICE) if cached else None
    with FlopCounterMode(display=False) as counter:
        soft_value_and_gradient(*launcher_arguments(case, lse))
    assert counter.get_total_flops() == products * 2 * 7 * 50 * 8


@each_dtype
@head_options
def test_scratch_is_all_that_is_allocated(head: str, dtype: torch.dtype):
    """Logits of all rows would be 4 times the scratch, a copy of W 1.6 times."""
    rows, vocab, size = 40, 24000, 16
    case = problem(head, rows, vocab, size, dtype)
    scratch = 5 * 2 * vocab * dtype.itemsize
    arguments = launcher_arguments(case)
    with LargestAllocation(arguments[2]) as seen:
        soft_value_and_gradient(*arguments, config=RowConfig(8192, 8), scratch_bytes=scratch)
    assert seen.nbytes == scratch


@each_dtype
def test_form_without_gradient_allocates_next_to_nothing(dtype: torch.dtype):
    case = problem("bias", 40, 2400, 64, dtype)
    arguments = launcher_arguments(case)
    with LargestAllocation(arguments[2]) as seen:
        soft_value_lse(*arguments, config=LseConfig(64, 128, 64, 4, 1))
    spans = -(-2400 // 128)
    assert seen.nbytes <= 4 * spans * 40 * 4


# --- offsets beyond 2^31 ----------------------------------------------------------------------------------------------


def far_rows(matrix: Tensor) -> Tensor:
    """The same matrix with its last row 2^31 elements after the first. Only the pages of its rows are ever touched."""
    rows, columns = matrix.shape
    stride = -(-(2**31) // (rows - 1)) + 16 - (-(-(2**31) // (rows - 1))) % 16
    memory = torch.empty((rows - 1) * stride + columns, dtype=matrix.dtype, device=DEVICE)
    far = memory.as_strided((rows, columns), (stride, 1))
    return far.copy_(matrix)


def far_columns(matrix: Tensor) -> Tensor:
    """The same matrix transposed in memory, its last column 2^31 elements after the first."""
    return far_rows(matrix.T.contiguous()).T


def test_offsets_of_columns_beyond_int32():
    """A head that is stored as (D, V)."""
    case = problem(rows=3, vocab=33, size=3, dtype=torch.bfloat16).to(DEVICE)
    near = launcher_arguments(case)
    far = (*near[:2], far_columns(near[2]), *near[3:])
    config = LseConfig(16, 16, 16, 4, 1)
    assert all(map(torch.equal, soft_value_lse(*far, config=config), soft_value_lse(*near, config=config)))
    q, weight = near[0], near[2]
    actions = torch.tensor([32, 0, 32], device=DEVICE)
    order, ends = transitions_of_states(torch.tensor([0, 2, 2], device=DEVICE), 3)
    first, second = (
        (
            taken_kernels.taken_value(q, w, actions),
            taken_kernels.hidden_gradient(
                None, None, torch.ones(3, device=DEVICE), w, actions, order, ends, torch.float32
            ),
        )
        for w in (far[2], weight)
    )
    assert all(map(torch.equal, first, second))


def test_offsets_beyond_int32():
    """Every matrix that a caller hands over, in every kernel that reads it; with 32-bit offsets the last row would be
    read 4 GiB before the first."""
    case = problem(rows=3, vocab=33, size=8, dtype=torch.bfloat16).to(DEVICE)
    q, b, w = case.hidden_q, case.hidden_b, case.weight
    near = launcher_arguments(case)
    config = LseConfig(16, 16, 16, 4, 1)
    for index in range(3):
        arguments = list(near)
        arguments[index] = far_rows(near[index])
        for launch, options in ((soft_value_lse, {"config": config}), (soft_value_and_gradient, {})):
            assert all(map(torch.equal, launch(*arguments, **options), launch(*near, **options)))
    actions = torch.tensor([32, 0, 32], device=DEVICE)
    order, ends = transitions_of_states(torch.tensor([0, 2, 2], device=DEVICE), 3)
    ones = torch.ones(3, device=DEVICE)
    for hidden, weight in ((far_rows(q), w), (q, far_rows(w))):
        assert torch.equal(taken_kernels.taken_value(hidden, weight, actions), taken_kernels.taken_value(q, w, actions))
    gradients = (
        taken_kernels.hidden_gradient(None, None, ones, weight, actions, order, ends, torch.float32)
        for weight in (far_rows(w), w)
    )
    assert torch.equal(*gradients)
    numbers = (0.7, 1.3)
    far_q, far_b = far_rows(q), far_rows(b)
    for launch in (residual_kernels.residual_log_probs, residual_kernels.residual_soft_value):
        first, second = launch(far_q, far_b, *numbers), launch(q, b, *numbers)
        assert torch.equal(first, second) if isinstance(first, Tensor) else all(map(torch.equal, first, second))
    first, second = (
        residual_kernels.residual_soft_value_bwd(*logits, ones, ones, *numbers) for logits in ((far_q, far_b), (q, b))
    )
    assert torch.equal(first, second)
    first, second = (
        residual_kernels.residual_log_probs_bwd(q.float(), grad, 1.3, torch.float32)
        for grad in (far_rows(b.float()), b.float())
    )
    assert torch.equal(first, second)


# --- fp32 is fp32 -----------------------------------------------------------------------------------------------------


class PrecisionOfProducts(TorchDispatchMode):
    """Records what cuBLAS would be allowed at every product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__:
            self.seen.add(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("allowed", ["tf32", "ieee"])
def test_products_of_fp32_are_ieee_whatever_the_user_allows(allowed: str):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, allowed
    try:
        with PrecisionOfProducts() as products:
            soft_value_and_gradient(*launcher_arguments(problem(dtype=torch.float32)))
        assert products.seen == {"ieee"}
        assert matmul.fp32_precision == allowed
        with pytest.raises(RuntimeError):  # D of the states and of W differ
            arguments = launcher_arguments(problem(dtype=torch.float32))
            soft_value_and_gradient(*arguments[:2], arguments[2][:, :3], *arguments[3:])
        assert matmul.fp32_precision == allowed
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_the_products(autocast: torch.dtype):
    """It would make 16-bit products of fp32; and a probability may be e^40, which fp16 does not hold."""
    case = problem("bias", dtype=torch.float32, vocab=70)
    case.options["bias"][-1] = 39.0
    expected = case.run("triton")
    with torch.autocast(DEVICE, autocast):
        hidden_q = case.hidden_q.clone().requires_grad_()
        value, lse = dataclasses.replace(case, hidden_q=hidden_q).value("triton")
    (value.cpu() * torch.linspace(-1.0, 2.0, len(value))).sum().backward()
    assert hidden_q.grad is not None
    assert all(map(torch.equal, (value.detach().cpu(), lse.cpu(), hidden_q.grad), expected))


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch):
    """Triton launches on the current device: with tensors on another one, that is another GPU's memory."""
    current: list[Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    launches = 0
    interpreted = type(online.finite_shift)

    def run(kernel: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        nonlocal launches
        launches += 1
        assert current and current[-1].device.type == DEVICE

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreted, "run", run)
    for operator, arguments in operator_calls("triton").values():
        operator(*arguments)
    assert launches >= 13


def test_scratch_of_a_huge_row_is_one_row():
    """A budget smaller than one row still makes progress."""
    row_bytes = 2 * 128256 * 2
    assert scratch_kernels.rows_per_chunk(row_bytes, 1000) == 1
    assert scratch_kernels.rows_per_chunk(row_bytes, 256 << 20) == 512
