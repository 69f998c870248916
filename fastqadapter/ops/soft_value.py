"""Linear soft value: `v`, and in training its gradient, from hidden states, without logits over the whole vocabulary.

    b = s (W h_b + bias)                        base logits, s = logit_scale
    q = s (W d + bias_q)                        residual Q-values
    v = alpha_tilde lse((q + alpha_0 log softmax(b)) / alpha_tilde)

`W` is frozen and shared, so

    v = alpha_tilde lse((q + alpha_0 b) / alpha_tilde) - alpha_0 lse(b)
    dv/dd = s softmax((q + alpha_0 b) / alpha_tilde) W =: e         (identity 2)

and the forward pass forms `v` and `e` together, tile of vocabulary by tile: 3 products of size N*D*V, 2 without
gradient; the backward pass only scales the rows of `e`. Where lse(b) is given it is one product less: by identity 1
`q + alpha_0 b = s W (d + alpha_0 h_b)`. Without it that would save nothing, and cost accuracy: `v` is a difference of
two lse, in which the rounding of `b` cancels as long as both see the same `b`. A sum `d + alpha_0 h_b` rounded to bf16
drowns a small `d`: where training starts, `v` was off by up to 87% that way, by 0.3% this way.

A soft-cap `c tanh(x / c)` on the logits is not linear: then `e` gets the cap's derivative, and a given lse(b) saves
nothing.

N rows, D hidden size, V vocabulary. Source: Li et al. 2024, https://arxiv.org/abs/2407.03856, eq. of the soft value;
the one-pass softmax is that of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastqadapter.ops import checks
from fastqadapter.ops.backends import Implementation, choose, fused_implementations, other_differentiation
from fastqadapter.ops.derivative import first_derivative

# Sizes of one tile of scores: large enough for the GEMM to run at full speed, small enough for its fp32 copy to stay
# in the last-level cache while it is turned into probabilities.
ROW_BLOCK = 512
VOCAB_TILE = 1024
# On a GPU each of the two dozen launches of a tile costs the same however small the tile is: with the sizes above
# 4112 rows of Gemma-2's head took 1072 ms on an H200, of which the products are 21. Scores of these take 128 MiB.
GPU_ROW_BLOCK = 2048
GPU_VOCAB_TILE = 8192


def tile_sizes(device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary of a tile."""
    return (ROW_BLOCK, VOCAB_TILE) if device.type == "cpu" else (GPU_ROW_BLOCK, GPU_VOCAB_TILE)


@dataclasses.dataclass(frozen=True, eq=False)
class HeadParams:
    """The numbers of one call that are not (N, D) or (V, D) tensors."""

    alpha_0: float
    alpha_tilde: float
    bias: Tensor | None = None  # (V,) of the base logits
    bias_q: Tensor | None = None  # (V,) of the Q-values
    logit_scale: float = 1.0
    softcap: float | None = None
    difference: bool = False


def soft_value_ref(
    hidden_q: Tensor,  # (N, D)
    hidden_b: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    params: HeadParams,
    base_lse: Tensor | None,  # (N,)
) -> tuple[Tensor, Tensor]:  # v (N,), base_lse (N,)
    """The definition, term by term: two (N, V) logit tensors, log-softmax, log-sum-exp. Any dtype; gradients by
    autograd."""
    base_logits = _logits(hidden_b, weight, params.bias, params)
    q_values = _logits(hidden_q, weight, params.bias_q, params)
    if params.difference:
        q_values = q_values - base_logits
    if base_lse is None:
        base_lse = torch.logsumexp(base_logits, dim=-1)
    log_pi = base_logits - base_lse.to(base_logits.dtype)[:, None]
    value = params.alpha_tilde * torch.logsumexp((q_values + params.alpha_0 * log_pi) / params.alpha_tilde, dim=-1)
    return value, base_lse


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, params: HeadParams) -> Tensor:
    """(N, V) logits in the accumulation dtype: the product in the dtype of `weight`, all else after it."""
    logits = F.linear(hidden.to(weight.dtype), weight).to(checks.accumulation_dtype(weight.dtype))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = params.logit_scale * logits
    if params.softcap is None:
        return logits
    return params.softcap * torch.tanh(logits / params.softcap) + _poison(hidden, logits.dtype)[:, None]


def _poison(hidden: Tensor, dtype: torch.dtype) -> Tensor:  # (N, D) -> (N,)
    """0 for each row, NaN for one with NaN or inf in it: the tanh of a soft-cap would hide an infinity."""
    return (0.0 * hidden.to(dtype)).sum(dim=-1)


class _OnlineLogSumExp:
    """Log-sum-exp over tiles of columns; in training also the running sum of `softmax @ W`."""

    def __init__(self, hidden: Tensor, dtype: torch.dtype, *, with_expected: bool):
        self.maximum = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=dtype)
        self.total = hidden.new_zeros(hidden.shape[:1], dtype=dtype)
        self.expected = hidden.new_zeros(hidden.shape, dtype=dtype) if with_expected else None

    def exponentiate_(self, scores: Tensor) -> Tensor:
        """Turn a tile of scores (rows, tile) in place into exp(scores - running maximum), and count it."""
        maximum = torch.maximum(self.maximum, scores.amax(dim=-1))
        # A row of -inf alone has exp(-inf - 0) = 0, where -inf - (-inf) would be NaN.
        shift = maximum.masked_fill(maximum == -torch.inf, 0.0)
        decay = torch.exp(self.maximum - shift)
        scores.sub_(shift[:, None]).exp_()
        self.total.mul_(decay).add_(scores.sum(dim=-1))
        if self.expected is not None:
            self.expected.mul_(decay[:, None])
        self.maximum = maximum
        return scores

    def result(self) -> Tensor:
        return self.maximum + torch.log(self.total)


def soft_value_fwd(
    hidden_q: Tensor,  # (N, D)
    hidden_b: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    params: HeadParams,
    base_lse: Tensor | None,  # (N,)
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # v (N,), base_lse (N,), e (N, D)
    """`v`, `lse(b)` and, if asked, `e = dv/dhidden_q`, over blocks of rows and tiles of the vocabulary."""
    blocks = []
    row_block, _ = tile_sizes(hidden_q.device)
    for start in range(0, hidden_q.shape[0], row_block):
        rows = slice(start, start + row_block)
        known_lse = None if base_lse is None else base_lse[rows]
        blocks.append(_row_block(hidden_q[rows], hidden_b[rows], weight, params, known_lse, with_gradient))
    values, lses, expected = zip(*blocks, strict=True)
    return torch.cat(values), torch.cat(lses), torch.cat(expected) if with_gradient else None


def _row_block(
    hidden_q: Tensor,
    hidden_b: Tensor,
    weight: Tensor,
    params: HeadParams,
    base_lse: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`soft_value_fwd` of one block of rows."""
    dtype = checks.accumulation_dtype(weight.dtype)
    base = _OnlineLogSumExp(hidden_q, dtype, with_expected=False)
    combined = _OnlineLogSumExp(hidden_q, dtype, with_expected=with_gradient)
    scores_of_tile = _summed_states if base_lse is not None and params.softcap is None else _both_logits
    for base_logits, scores, slope, tile in scores_of_tile(hidden_q, hidden_b, weight, params, with_gradient):
        probabilities = combined.exponentiate_(scores)
        if combined.expected is not None:
            if slope is not None:
                probabilities.mul_(slope)
            combined.expected.add_(_product(probabilities, tile))
        if base_lse is None:
            base.exponentiate_(base_logits)
    base_lse = base.result() if base_lse is None else base_lse.to(dtype)
    value = params.alpha_tilde * combined.result() - params.alpha_0 * base_lse
    factor = params.logit_scale / combined.total
    if params.softcap is not None:
        poison_b, poison_q = _poison(hidden_b, dtype), _poison(hidden_q, dtype)
        base_lse, value, factor = base_lse + poison_b, value + poison_b + poison_q, factor + poison_b + poison_q
    return value, base_lse, None if combined.expected is None else combined.expected.mul_(factor[:, None])


# Base logits, scores (q + alpha_0 b) / alpha_tilde, derivative of the soft-cap (or None), tile of W.
_Tile = tuple[Tensor, Tensor, Tensor | None, Tensor]


def _tiles(weight: Tensor) -> Iterator[slice]:
    """Parts of the vocabulary."""
    _, vocab_tile = tile_sizes(weight.device)
    return (slice(start, start + vocab_tile) for start in range(0, weight.shape[0], vocab_tile))


def _both_logits(
    hidden_q: Tensor, hidden_b: Tensor, weight: Tensor, params: HeadParams, with_gradient: bool
) -> Iterator[_Tile]:
    """Both logits of each tile of the vocabulary in one product `[h_b; d] W^T`, then combined."""
    dtype, cap = checks.accumulation_dtype(weight.dtype), params.softcap
    rows = hidden_q.shape[0]
    stacked = torch.cat([hidden_b.to(weight.dtype), hidden_q.to(weight.dtype)])
    share_of_base = params.alpha_0 - (1.0 if params.difference else 0.0)
    for columns in _tiles(weight):
        logits = F.linear(stacked, weight[columns]).to(dtype)
        base_logits, q_values = logits[:rows], logits[rows:]
        for part, bias in ((base_logits, params.bias), (q_values, params.bias_q)):
            if bias is not None:
                part.add_(bias[columns])
        slope = None
        if cap is not None:
            squashed = logits.mul_(params.logit_scale / cap).tanh_()
            slope = 1.0 - squashed[rows:].square() if with_gradient else None
            logits.mul_(cap)
        elif params.logit_scale != 1.0:
            logits.mul_(params.logit_scale)
        scores = q_values.add_(base_logits, alpha=share_of_base).div_(params.alpha_tilde)
        yield base_logits, scores, slope, weight[columns]


def _summed_states(
    hidden_q: Tensor, hidden_b: Tensor, weight: Tensor, params: HeadParams, with_gradient: bool
) -> Iterator[_Tile]:
    """The scores alone, by identity 1 in one product of half the rows."""
    dtype = checks.accumulation_dtype(weight.dtype)
    summed = (hidden_q.to(dtype) + params.alpha_0 * hidden_b.to(dtype)).to(weight.dtype)
    bias = None if params.bias_q is None else params.bias_q.to(dtype)
    if params.bias is not None:
        bias = params.alpha_0 * params.bias.to(dtype) + (0.0 if bias is None else bias)
    for columns in _tiles(weight):
        scores = F.linear(summed, weight[columns]).to(dtype)
        if bias is not None:
            scores.add_(bias[columns])
        yield scores, scores.mul_(params.logit_scale / params.alpha_tilde), None, weight[columns]


def _product(probabilities: Tensor, tile: Tensor) -> Tensor:
    """`probabilities @ tile`; in fp32 for fp16, whose largest number 65504 is soon reached by an unnormalised sum."""
    if tile.dtype == torch.float16:
        return probabilities @ tile.to(probabilities.dtype)
    return probabilities.to(tile.dtype) @ tile


class SoftValueFunction(torch.autograd.Function):
    """`soft_value_fwd` with its gradient: `dd = g_v e`, a new tensor each time, so backward may run twice."""

    @staticmethod
    def forward(ctx, hidden_q, hidden_b, weight, params, base_lse, with_gradient):  # type: ignore[no-untyped-def]
        value, base_lse, expected = soft_value_fwd(hidden_q, hidden_b, weight, params, base_lse, with_gradient)
        ctx.save_for_backward(hidden_q, expected)
        ctx.mark_non_differentiable(base_lse)
        return value, base_lse

    @staticmethod
    def backward(ctx, grad_value, _):  # type: ignore[no-untyped-def]
        hidden_q, expected = ctx.saved_tensors
        gradient = (grad_value[:, None] * expected).to(hidden_q.dtype)
        return first_derivative(gradient, hidden_q), None, None, None, None, None


def soft_value_tiled(
    hidden_q: Tensor,  # (N, D)
    hidden_b: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    params: HeadParams,
    base_lse: Tensor | None,  # (N,)
) -> tuple[Tensor, Tensor]:  # v (N,), base_lse (N,)
    """`soft_value_ref` tile by tile; forms `e` only where a gradient may be asked for."""
    with_gradient = torch.is_grad_enabled() and hidden_q.requires_grad
    return SoftValueFunction.apply(hidden_q, hidden_b, weight, params, base_lse, with_gradient)


def _fused(*args: Any) -> tuple[Tensor, Tensor]:
    from fastqadapter.ops.fused.soft_value import soft_value_fused

    return soft_value_fused(*args)


IMPLEMENTATIONS = {
    **fused_implementations("soft_value", _fused),
    "torch": Implementation(soft_value_tiled, other_differentiation),
    "eager": Implementation(soft_value_ref),
}


def soft_value(
    hidden_q: Tensor,  # (N, D)
    hidden_b: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    *,
    alpha_0: float,
    alpha_tilde: float,
    bias: Tensor | None = None,  # (V,)
    bias_q: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    difference: bool = False,
    base_lse: Tensor | None = None,  # (N,)
    return_base_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Soft value `v = alpha_tilde lse((q + alpha_0 log pi) / alpha_tilde)` of each row, from hidden states.

    Args:
        hidden_q: (N, D) `d`, so that `q = logit_scale (W d + bias_q)`; the only argument that gets a gradient. Under
            a soft-cap: `h_q` itself, see `difference`. In the dtype of `weight` or float32.
        hidden_b: (N, D) last hidden states of the frozen base; dtype as `hidden_q`.
        weight: (V, D) frozen LM head, any of bf16, fp16, fp32, fp64.
        alpha_0: weight of the base policy, >= 0.
        alpha_tilde: temperature of the customised policy, > 0.
        bias: (V,) bias of the base logits.
        bias_q: (V,) bias of the Q-values (None for a `difference` head, where the bias cancels).
        logit_scale: factor on all logits.
        softcap: `c` of a final soft-cap `c tanh(logits / c)` on base logits and Q stream alike.
        difference: only with `softcap`: q = capped logits of `hidden_q` - capped base logits.
        base_lse: (N,) lse of the base logits where it is known already; saves one product of size N*D*V, at some
            accuracy in half precision: `v` is a difference of two lse, whose roundings cancel where both see the same
            logits (off by up to 87% where training starts, instead of 0.3%).
        return_base_lse: also return that lse.
        backend: `auto`, `triton`, `cpu`, `torch` or `eager`.

    Returns:
        (N,) float32 (float64 for a float64 `weight`); with `return_base_lse` the pair `(v, base_lse)`. NaN or inf in
        a row gives NaN there.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a trainable `weight`, a number outside its range.
    """
    params = HeadParams(alpha_0, alpha_tilde, bias, bias_q, logit_scale, softcap, difference)
    check_states(hidden_q, hidden_b, weight, params)
    rows = hidden_q.shape[0]
    if base_lse is not None:
        checks.check_vector("base_lse", base_lse, rows, weight, "N")
    args = (hidden_q, hidden_b, weight, params, base_lse)
    run = choose("soft_value", IMPLEMENTATIONS, backend, *args)
    if rows == 0:
        dtype = checks.accumulation_dtype(weight.dtype)
        value, lse = hidden_q.sum(dim=-1).to(dtype), torch.zeros(0, dtype=dtype, device=weight.device)
    else:
        value, lse = run(*args)
    return (value, lse) if return_base_lse else value


def check_states(hidden_q: Tensor, hidden_b: Tensor, weight: Tensor, params: HeadParams) -> None:
    """Raise a ValueError unless states, head and numbers fit together; see `soft_value`."""
    checks.check_weight(weight)
    checks.check_hidden("hidden_q", hidden_q, weight)
    checks.check_hidden("hidden_b", hidden_b, weight)
    checks.check_frozen("hidden_b", hidden_b)
    if hidden_b.shape[0] != hidden_q.shape[0]:
        raise ValueError(
            f"hidden_b has {hidden_b.shape[0]} rows, hidden_q {hidden_q.shape[0]}; expected the same states in both"
        )
    for name, vector in (("bias", params.bias), ("bias_q", params.bias_q)):
        if vector is not None:
            checks.check_vector(name, vector, weight.shape[0], weight, "V")
    checks.check_alphas(params.alpha_0, params.alpha_tilde)
    for name, number in (("softcap", params.softcap), ("logit_scale", params.logit_scale)):
        if number is not None or name == "logit_scale":
            checks.check_number(name, number)
    if params.softcap is not None and not 0 < params.softcap < float("inf"):
        raise ValueError(f"softcap={params.softcap!r} is outside its legal range (0, inf)")
    if not abs(params.logit_scale) < float("inf"):
        raise ValueError(f"logit_scale={params.logit_scale!r} is not a finite number")
    if params.difference and params.softcap is None:
        raise ValueError("difference=True is for soft-capped logits; without softcap pass hidden_q = h_q - h_b")
