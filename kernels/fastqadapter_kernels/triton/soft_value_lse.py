"""Soft value without gradient, and the log-sum-exp of base logits: a GEMM whose epilogue is the log-sum-exp.

    b = cap(s (W h_b + bias_b)),  q = cap(s (W d + bias_q)),  c = (q + alpha_0 b) / alpha_tilde
    v = alpha_tilde lse(c) - alpha_0 lse(b)

No logit leaves the registers. In the form with both products the accumulators of the same rows of `h_b` and `d` share
each tile of `W`, so `c` is formed in fp32 from unrounded products. Each program walks over a span of the vocabulary
and leaves (maximum, sum) for its rows; a second kernel combines the spans. No locks, no atomics: the same bits in every
run. The tile economy is that of a plain GEMM: 128 x 128 twice reads as many bytes for a product as 128 x 256 once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastqadapter_kernels.triton import autotune
from fastqadapter_kernels.triton.device import INTERPRETED, Hardware, hardware, launch_options, on_its_device
from fastqadapter_kernels.triton.online import finite_shift, head_logits, log_sum_exp, online_rows
from fastqadapter_kernels.triton.soft_value import poison


@dataclasses.dataclass(frozen=True)
class LseConfig:
    """Tile of scores (block_n, block_v), step over D, and how a program is run."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    tma: bool = False  # tensor descriptors: sm_90 and newer, aligned rows
    precision: str = "ieee"  # of fp32 products: "ieee", or "tf32x3" on tensor cores; never plain TF32

    @staticmethod
    def rule(hw: Hardware, dtype: torch.dtype, rows: int, both: bool, aligned: bool) -> LseConfig:
        """The configuration for `rows` rows of each stream.

        `both`: two products, so two accumulators. `aligned`: every row of every matrix starts at 16 bytes; others are
        loaded number by number, whose addresses fill the registers that a large tile would need.
        """
        if hw.arch == "interpreter":  # several tiles and spans in tiny problems
            return LseConfig(16, 16, 32, 4, 1, aligned)
        if dtype == torch.float32:
            if hw.is_hip:
                return LseConfig(64, 64, 16, 8, 2)
            return LseConfig(64 if hw.has_tma else 32, 64, 16, 8, 3, precision="tf32x3")
        if not aligned:
            return LseConfig(64, 64, 32, 8, 1 if hw.is_hip else 2)
        block_n = 64 if rows <= 64 else 128
        if hw.is_hip:
            return LseConfig(block_n, 64 if both else 128, 64, 8, 2)
        if hw.has_tma:
            return LseConfig(block_n, 128 if both else 256, 64, block_n // 16, 3, tma=True)
        return LseConfig(block_n, 128, 32, 8, 3)

    def alternatives(self) -> list[LseConfig]:
        """This configuration and what autotuning tries beside it."""
        steps = [step for step in (self.block_d // 2, self.block_d, self.block_d * 2) if step >= 16]
        choices = itertools.product((self.block_v // 2, self.block_v), steps, (2, 3, 4))
        others = [dataclasses.replace(self, block_v=v, block_d=d, num_stages=stages) for v, d, stages in choices]
        return [self, *(other for other in others if other != self)]

    def tiles_per_span(self, hw: Hardware, rows: int, vocab: int) -> int:
        """Vocabulary tiles of one program: up to 16, as long as four programs remain for each multiprocessor."""
        programs = triton.cdiv(rows, self.block_n) * triton.cdiv(vocab, self.block_v)
        return max(1, min(16, programs // (4 * hw.multiprocessors)))

    def blocks_in_cache(self, hw: Hardware, state_bytes: int) -> int:
        """Blocks of rows whose states, `state_bytes` a row, fill a quarter of the cache; tiles of W take the rest."""
        return max(1, hw.cache_bytes // 4 // (self.block_n * state_bytes))


@triton.jit
def _load_tile(
    source, row, column, rows, columns, stride_row, stride_column,
    TMA: tl.constexpr, EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tile (BLOCK_R, BLOCK_C) at (row, column); zeros outside. EVEN: BLOCK_C divides the number of columns."""
    if TMA:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, BLOCK_R)
        c = column + tl.arange(0, BLOCK_C)
        pointers = source + r.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_column
        mask = (r < rows)[:, None]
        if not EVEN:
            mask = mask & (c < columns)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def _product(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`accumulator + a b^T`. The interpreter reads bf16 operands of a dot as integers: it gets them in fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), accumulator, input_precision=PRECISION)


@triton.jit
def _load_bias(bias_ptr, offsets, v, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offsets, mask=offsets < v, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros_like(offsets).to(tl.float32)
    return bias[None, :]


# What changes from batch to batch must not be compiled in: each would be a new kernel, seconds in the midst of a run.
@triton.jit(do_not_specialize=["n", "row_blocks", "group", "tiles_per_span", "spans"])
def _soft_value_lse_kernel(
    h_b, d_q, w, bias_b_ptr, bias_q_ptr,  # tensors (n, d), (n, d), (v, d), (v,), (v,), or descriptors
    partial_ptr,  # (4 or 2, spans, n)
    n, d, v, row_blocks, group, tiles_per_span, spans,
    stride_bn, stride_bd, stride_qn, stride_qd, stride_wv, stride_wd,
    share_of_base, inv_alpha_tilde, logit_scale, softcap,
    BOTH: tl.constexpr, HAS_BIAS_B: tl.constexpr, HAS_BIAS_Q: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time take one span of W for different rows, but of a group of rows only whose states
    # stay in the cache: they are read again for every tile of W.
    pid = tl.program_id(0)
    first_block = pid // (group * spans) * group
    blocks_of_group = tl.minimum(row_blocks - first_block, group)
    place = pid % (group * spans)
    span = place // blocks_of_group
    row = (first_block + place % blocks_of_group) * BLOCK_N

    maximum_b = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total_b = tl.zeros((BLOCK_N,), tl.float32)
    maximum_c = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total_c = tl.zeros((BLOCK_N,), tl.float32)
    first = span * tiles_per_span
    for tile in range(first, tl.minimum(first + tiles_per_span, tl.cdiv(v, BLOCK_V))):
        column = tile * BLOCK_V
        b = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        q = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(0, d, BLOCK_D):
            w_tile = _load_tile(w, column, k, v, d, stride_wv, stride_wd, TMA, EVEN_D, BLOCK_V, BLOCK_D)
            b_tile = _load_tile(h_b, row, k, n, d, stride_bn, stride_bd, TMA, EVEN_D, BLOCK_N, BLOCK_D)
            b = _product(b_tile, w_tile, b, PRECISION, UPCAST)
            if BOTH:
                q_tile = _load_tile(d_q, row, k, n, d, stride_qn, stride_qd, TMA, EVEN_D, BLOCK_N, BLOCK_D)
                q = _product(q_tile, w_tile, q, PRECISION, UPCAST)

        offsets = column + tl.arange(0, BLOCK_V)
        inside = (offsets < v)[None, :]
        b = head_logits(b, _load_bias(bias_b_ptr, offsets, v, HAS_BIAS_B), logit_scale, softcap, HAS_SOFTCAP)
        if BOTH:
            q = head_logits(q, _load_bias(bias_q_ptr, offsets, v, HAS_BIAS_Q), logit_scale, softcap, HAS_SOFTCAP)
            c = (q + share_of_base * b) * inv_alpha_tilde
            maximum_c, total_c = online_rows(maximum_c, total_c, tl.where(inside, c, float("-inf")))
        maximum_b, total_b = online_rows(maximum_b, total_b, tl.where(inside, b, float("-inf")))

    rows = row + tl.arange(0, BLOCK_N)
    part = tl.cast(spans, tl.int64) * n  # elements of one of the partial arrays
    out = partial_ptr + tl.cast(span, tl.int64) * n + rows
    tl.store(out, maximum_b, mask=rows < n)
    tl.store(out + part, total_b, mask=rows < n)
    if BOTH:
        tl.store(out + 2 * part, maximum_c, mask=rows < n)
        tl.store(out + 3 * part, total_c, mask=rows < n)


@triton.jit
def _combine_spans(partial_ptr, rows, n, spans, BLOCK_N: tl.constexpr):
    """lse of `rows` from (maximum, total) of every span."""
    maximum = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    part = tl.cast(spans, tl.int64) * n
    for span in range(spans):
        source = partial_ptr + tl.cast(span, tl.int64) * n + rows
        span_maximum = tl.load(source, mask=rows < n, other=float("-inf"))
        span_total = tl.load(source + part, mask=rows < n, other=0.0)
        raised = tl.maximum(maximum, span_maximum)
        shift = finite_shift(raised)
        total = total * tl.exp(maximum - shift) + span_total * tl.exp(span_maximum - shift)
        maximum = raised
    return log_sum_exp(maximum, total)


@triton.jit(do_not_specialize=["n", "spans"])
def _combine_spans_kernel(
    partial_ptr,  # (4 or 2, spans, n)
    base_lse_ptr, value_ptr,  # (n,), (n,)
    n, spans,
    alpha_0, alpha_tilde,
    BOTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    base_lse = _combine_spans(partial_ptr, rows, n, spans, BLOCK_N)
    tl.store(base_lse_ptr + rows, base_lse, mask=rows < n)
    if BOTH:
        lse = _combine_spans(partial_ptr + 2 * tl.cast(spans, tl.int64) * n, rows, n, spans, BLOCK_N)
        tl.store(value_ptr + rows, alpha_tilde * lse - alpha_0 * base_lse, mask=rows < n)


def _is_aligned(tensor: Tensor, tma: bool) -> bool:
    """Whether tiles can be loaded 16 bytes at a time: by TMA where rows start at 16 bytes, else where the compiler sees
    that they do, which is for multiples of 16 numbers. Rows must not overlap, as those of an expanded tensor do."""
    size, stride = tensor.shape[1], tensor.stride(0)
    whole = stride * tensor.element_size() % 16 == 0 if tma else stride % 16 == 0 and size % 16 == 0
    return whole and tensor.stride(1) == 1 and stride >= size and tensor.data_ptr() % 16 == 0


def _launch(
    hidden_b: Tensor,  # (N, D)
    hidden_q: Tensor | None,  # (N, D), None: the lse of hidden_b alone
    weight: Tensor,  # (V, D)
    bias_b: Tensor | None,  # (V,)
    bias_q: Tensor | None,  # (V,)
    share_of_base: float,
    alpha_0: float,
    alpha_tilde: float,
    logit_scale: float,
    softcap: float | None,
    config: LseConfig | None,
) -> tuple[Tensor, Tensor]:  # lse (N,), v (N,)
    (rows, size), vocab, both = hidden_b.shape, weight.shape[0], hidden_q is not None
    hw = hardware(weight.device)
    second = hidden_b if hidden_q is None else hidden_q
    if config is None:
        tma = hw.has_tma and weight.dtype != torch.float32
        aligned = all(_is_aligned(tensor, tma) for tensor in (hidden_b, second, weight))
        config = LseConfig.rule(hw, weight.dtype, rows, both, aligned)
        if autotune.enabled():
            problem = (weight.dtype, size, vocab, triton.next_power_of_2(rows), both, aligned)
            numbers = (share_of_base, alpha_0, alpha_tilde, logit_scale, softcap)
            launch = functools.partial(_launch, hidden_b, hidden_q, weight, bias_b, bias_q, *numbers)
            config = autotune.best("soft_value_lse", weight.device, problem, config.alternatives(), launch)
    row_blocks, tiles = triton.cdiv(rows, config.block_n), triton.cdiv(vocab, config.block_v)
    tiles_per_span = config.tiles_per_span(hw, rows, vocab)
    spans = triton.cdiv(tiles, tiles_per_span)
    state_bytes = (2 if both else 1) * size * weight.element_size()
    group = min(row_blocks, config.blocks_in_cache(hw, state_bytes))
    partial = weight.new_empty((4 if both else 2, spans, rows), dtype=torch.float32)
    lse = weight.new_empty(rows, dtype=torch.float32)
    value = torch.empty_like(lse)

    blocks = (config.block_n, config.block_n, config.block_v)
    sources = [
        TensorDescriptor.from_tensor(tensor, [block, config.block_d]) if config.tma else tensor
        for tensor, block in zip((hidden_b, second, weight), blocks, strict=True)
    ]
    _soft_value_lse_kernel[(row_blocks * spans,)](
        *sources, bias_b, bias_q, partial,
        rows, size, vocab, row_blocks, group, tiles_per_span, spans,
        *hidden_b.stride(), *second.stride(), *weight.stride(),
        share_of_base, 1.0 / alpha_tilde, logit_scale, softcap or 1.0,
        BOTH=both, HAS_BIAS_B=bias_b is not None, HAS_BIAS_Q=bias_q is not None, HAS_SOFTCAP=softcap is not None,
        TMA=config.tma, EVEN_D=size % config.block_d == 0, PRECISION=config.precision, UPCAST=INTERPRETED,
        BLOCK_N=config.block_n, BLOCK_V=config.block_v, BLOCK_D=config.block_d,
        num_stages=config.num_stages, **launch_options(hw, config.num_warps),
    )  # fmt: skip
    _combine_spans_kernel[(triton.cdiv(rows, 128),)](
        partial, lse, value, rows, spans, alpha_0, alpha_tilde,
        BOTH=both, BLOCK_N=128, **launch_options(hw, 4),
    )  # fmt: skip
    return lse, value


@on_its_device
def linear_lse(
    hidden: Tensor,  # (N, D), in the dtype of weight
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    *,
    config: LseConfig | None = None,
) -> Tensor:  # (N,), fp32
    """`lse(cap(logit_scale (W h + bias)))` of each row."""
    lse, _ = _launch(hidden, None, weight, bias, None, 0.0, 0.0, 1.0, logit_scale, softcap, config)
    return lse


@on_its_device
def soft_value_lse(
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
    config: LseConfig | None = None,
) -> tuple[Tensor, Tensor]:  # v (N,), base_lse (N,), fp32
    """Soft value and lse of the base logits; arguments as those of `soft_value_and_gradient`. With a given `base_lse`
    and no soft-cap one product is saved by identity 1."""
    dtype = weight.dtype
    if base_lse is None or softcap is not None:
        share = alpha_0 - 1.0 if difference else alpha_0
        lse, value = _launch(
            hidden_b.to(dtype), hidden_q.to(dtype), weight, bias_b, bias_q,
            share, alpha_0, alpha_tilde, logit_scale, softcap, config,
        )  # fmt: skip
        if softcap is not None:
            poison_b = poison(hidden_b)
            lse += poison_b
            value += poison_b + poison(hidden_q)
        if base_lse is None:
            return value, lse
        return value + alpha_0 * (lse - base_lse), base_lse.clone()
    summed = (hidden_q.float() + alpha_0 * hidden_b.float()).to(dtype)
    bias = None if bias_q is None else bias_q.float()
    if bias_b is not None:
        bias = alpha_0 * bias_b.float() + (0.0 if bias is None else bias)
    lse = linear_lse(summed, weight, bias, logit_scale / alpha_tilde, None, config=config)
    return alpha_tilde * lse - alpha_0 * base_lse, base_lse.clone()
