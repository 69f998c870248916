"""Soft value with its gradient, in the forward pass: library GEMMs on a bounded scratch, and one row kernel.

    b = cap(s (W h_b + bias_b)),  q = cap(s (W d + bias_q)),  c = (q + alpha_0 b) / alpha_tilde
    v = alpha_tilde lse(c) - alpha_0 lse(b),    e = dv/dd = s (softmax(c) cap'(...)) W

Per chunk of rows: one GEMM writes the products `[h_b; d] W^T` into the scratch, the row kernel turns the rows of `b`
into their lse and overwrites those of `q` with probabilities, and one GEMM with them gives `e`: 3 GEMMs of size
N*D*V. With a given lse(b) and no soft-cap only the sum `d + alpha_0 h_b` is multiplied (identity 1): 2 GEMMs.

Every score is read once and every probability written once, though a row of 262144 scores fits no multiprocessor: a
probability may carry any factor that is the same for its whole row, and `e` is divided by it at the end. So the kernel
subtracts not the final maximum but a *shift*, the maximum of the first tile. Only if a later tile exceeds the shift by
more than `HEADROOM` it is raised and what was written is scaled down; 16-bit floats keep their relative precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqadapter_kernels.triton import autotune
from fastqadapter_kernels.triton.device import Hardware, hardware, launch_options, on_its_device
from fastqadapter_kernels.triton.online import finite_shift, head_logits, log_sum_exp, online_lanes

SCRATCH_BYTES = 256 << 20  # of scores, at any one time

# exp(HEADROOM) times 2^18 tokens is far from the largest fp32 and bf16; fp16 ends at 65504 = exp(11.09), and a shift
# close to the maximum keeps its small probabilities out of the subnormals.
HEADROOM = {torch.bfloat16: 40.0, torch.float32: 40.0, torch.float16: 8.0}


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """How the program of one row is run: the scores that it takes at a time, 8 a lane."""

    block_v: int
    num_warps: int

    @staticmethod
    def rule(hw: Hardware, vocab: int) -> RowConfig:
        if hw.arch == "interpreter":  # several tiles in tiny problems
            return RowConfig(32, 4)
        block_v = 2048 if vocab > 1024 else 1024
        if hw.is_hip:
            return RowConfig(block_v, block_v // 512)
        return RowConfig(block_v, block_v // 256)

    def alternatives(self) -> list[RowConfig]:
        """This configuration and what autotuning tries beside it."""
        sizes = ((self.block_v, self.num_warps * 2), (self.block_v * 2, self.num_warps * 2), (1024, 4), (4096, 8))
        return [self, *(dataclasses.replace(self, block_v=v, num_warps=warps) for v, warps in sizes)]


@triton.jit
def _probabilities_kernel(
    base_ptr, scores_ptr,  # (n, v), (n, v): products with h_b and d (BOTH), or the summed states' in scores alone
    bias_b_ptr, bias_q_ptr, base_lse_ptr,  # (v,), (v,), (n,)
    value_ptr, lse_ptr, factor_ptr,  # (n,), (n,), (n,)
    v, stride_scores,  # the stride is v rounded up to whole vectors: what lies between may hold anything
    alpha_0, share_of_base, alpha_tilde, logit_scale, softcap, headroom,
    BOTH: tl.constexpr, HAS_BIAS_B: tl.constexpr, HAS_BIAS_Q: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base_ptr += row * stride_scores
    scores_ptr += row * stride_scores
    lanes = tl.arange(0, BLOCK_V)

    inverse_temperature = 1.0 / alpha_tilde
    maximum_b = tl.full((), float("-inf"), tl.float32)
    totals_b = tl.zeros((BLOCK_V,), tl.float32)
    shift = tl.full((), float("-inf"), tl.float32)
    totals_c = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, v, BLOCK_V):
        columns = start + lanes
        inside = columns < v
        allocated = columns < stride_scores
        q = tl.load(scores_ptr + columns, mask=allocated, other=0.0).to(tl.float32)
        if HAS_BIAS_Q:
            bias_q = tl.load(bias_q_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        else:
            bias_q = 0.0
        if HAS_BIAS_B:
            bias_b = tl.load(bias_b_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        else:
            bias_b = 0.0
        if BOTH:
            b = tl.load(base_ptr + columns, mask=allocated, other=0.0).to(tl.float32)
            b = head_logits(b, bias_b, logit_scale, softcap, HAS_SOFTCAP)
            q = head_logits(q, bias_q, logit_scale, softcap, HAS_SOFTCAP)
            c = (q + share_of_base * b) * inverse_temperature
            if not HAS_LSE:
                maximum_b, totals_b = online_lanes(maximum_b, totals_b, tl.where(inside, b, float("-inf")))
        else:
            c = head_logits(q, bias_q + alpha_0 * bias_b, logit_scale, softcap, False) * inverse_temperature
        c = tl.where(inside, c, float("-inf"))

        maximum = tl.max(c, axis=0)
        if maximum > shift + headroom:
            scale = tl.exp(shift - maximum)
            totals_c *= scale
            if shift > float("-inf"):
                tl.debug_barrier()
                for written in range(0, start, BLOCK_V):
                    before = tl.load(scores_ptr + written + lanes).to(tl.float32)
                    tl.store(scores_ptr + written + lanes, (before * scale).to(scores_ptr.dtype.element_ty))
            shift = maximum
        p = tl.exp(c - finite_shift(shift))
        totals_c += p
        if HAS_SOFTCAP:
            squashed = q * (1.0 / softcap)
            p *= 1.0 - squashed * squashed
        tl.store(scores_ptr + columns, p.to(scores_ptr.dtype.element_ty), mask=allocated)

    total = tl.sum(totals_c, axis=0)
    if HAS_LSE:
        base_lse = tl.load(base_lse_ptr + row)
    else:
        base_lse = log_sum_exp(maximum_b, tl.sum(totals_b, axis=0))
    tl.store(lse_ptr + row, base_lse)
    tl.store(value_ptr + row, alpha_tilde * log_sum_exp(shift, total) - alpha_0 * base_lse)
    tl.store(factor_ptr + row, logit_scale / total)


_PRECISION = threading.RLock()


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    """fp32 products in full precision, whatever the user allows for others: TF32 keeps 10 bits of 23."""
    matmul = torch.backends.cuda.matmul
    with _PRECISION:  # one setting for all threads: nobody may restore it while another one multiplies
        before = matmul.fp32_precision
        if before == "tf32":
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            if before == "tf32":
                matmul.fp32_precision = before


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    with _ieee_products() if a.dtype == torch.float32 else contextlib.nullcontext():
        return torch.mm(a, b, out=out)


def _expected_embedding(probabilities: Tensor, weight: Tensor) -> Tensor:  # (R, V), (V, D) -> (R, D) fp32
    """The product accumulated and returned in fp32: unnormalised sums leave the range of fp16."""
    if weight.dtype == torch.float32:
        return _product(probabilities, weight, weight.new_empty((probabilities.shape[0], weight.shape[1])))
    if weight.device.type == "cuda":
        return torch.mm(probabilities, weight, out_dtype=torch.float32)
    tiles = zip(probabilities.split(1024, dim=1), weight.split(1024), strict=True)  # no fp32 copy of the whole W
    expected = weight.new_zeros((probabilities.shape[0], weight.shape[1]), dtype=torch.float32)
    for p, w in tiles:
        expected.addmm_(p.float(), w.float())
    return expected


def poison(hidden: Tensor) -> Tensor:  # (N, D) -> (N,)
    """0 for each row, NaN for one with NaN or inf in it: the tanh of a soft-cap would hide an infinity."""
    return 0.0 * hidden.sum(dim=1, dtype=torch.float32)


def rows_per_chunk(row_bytes: int, scratch_bytes: int) -> int:
    """Rows whose scores fit the scratch; a multiple of the GEMM's 128 where it can be, and at least one."""
    rows = scratch_bytes // row_bytes
    return max(1, rows // 128 * 128 or rows)


@on_its_device
def soft_value_and_gradient(
    hidden_q: Tensor,  # (N, D)
    hidden_b: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias_b: Tensor | None,  # (V,)
    bias_q: Tensor | None,  # (V,)
    base_lse: Tensor | None,  # (N,) fp32
    alpha_0: float,
    alpha_tilde: float,
    logit_scale: float,
    softcap: float | None,
    difference: bool,
    *,
    config: RowConfig | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:  # v (N,), base_lse (N,), e (N, D), all fp32
    """Soft value, lse of the base logits and expected embedding; `difference`: q is the second product's logits less
    the base logits. States in another dtype than `weight` are rounded to it."""
    (rows, size), vocab = hidden_q.shape, weight.shape[0]
    hw = hardware(weight.device)
    if config is None:
        config = RowConfig.rule(hw, vocab)
        if autotune.enabled():
            problem = (weight.dtype, size, vocab, triton.next_power_of_2(rows), base_lse is None, softcap is None)
            numbers = (alpha_0, alpha_tilde, logit_scale, softcap, difference)
            args = (hidden_q, hidden_b, weight, bias_b, bias_q, base_lse, *numbers)
            config = autotune.best(
                "soft_value_and_gradient",
                weight.device,
                problem,
                config.alternatives(),
                lambda config: soft_value_and_gradient(*args, config=config, scratch_bytes=scratch_bytes),
            )
    both = base_lse is None or softcap is not None
    products = 2 if both else 1
    stride = triton.cdiv(vocab, 16) * 16
    chunk = min(rows, rows_per_chunk(products * stride * weight.element_size(), scratch_bytes))
    scratch = weight.new_empty((products * chunk, stride))
    states = weight.new_empty((products * chunk, size))
    value, lse, factor = (weight.new_empty(rows, dtype=torch.float32) for _ in range(3))
    expected = weight.new_empty((rows, size), dtype=torch.float32)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        count = part.stop - part.start
        if both:
            states[:count] = hidden_b[part]
            states[count : 2 * count] = hidden_q[part]
        else:
            states[:count] = hidden_q[part].float() + alpha_0 * hidden_b[part].float()
        scores = _product(states[: products * count], weight.T, scratch[: products * count, :vocab])
        _probabilities_kernel[(count,)](
            scores, scores[-count:], bias_b, bias_q, base_lse if base_lse is None else base_lse[part],
            value[part], lse[part], factor[part],
            vocab, stride,
            alpha_0, alpha_0 - 1.0 if difference else alpha_0, alpha_tilde, logit_scale, softcap or 1.0,
            HEADROOM[weight.dtype],
            BOTH=both, HAS_BIAS_B=bias_b is not None, HAS_BIAS_Q=bias_q is not None,
            HAS_SOFTCAP=softcap is not None, HAS_LSE=base_lse is not None,
            BLOCK_V=config.block_v, **launch_options(hw, config.num_warps),
        )  # fmt: skip
        if softcap is not None:
            poison_b = poison(hidden_b[part])
            poison_of_both = poison_b + poison(hidden_q[part])
            lse[part] += poison_b
            value[part] += poison_of_both
            factor[part] += poison_of_both
        torch.mul(_expected_embedding(scores[-count:], weight), factor[part, None], out=expected[part])
    return value, lse, expected
