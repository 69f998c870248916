"""Linear soft value: `v`, and in training its gradient, from hidden states, without logits over the whole vocabulary.

    b = s (W h_b + bias)                        base logits, s = logit_scale
    q = s (W d + bias_q)                        residual Q-values
    v = alpha_tilde lse((q + alpha_0 log softmax(b)) / alpha_tilde)

`W` is linear and shared, so with `h_c = (d + alpha_0 h_b) / alpha_tilde`

    v = alpha_tilde lse(s (W h_c + bias_c)) - alpha_0 lse(b)        (identity 1)
    dv/dd = s softmax(s (W h_c + bias_c)) W =: e                    (identity 2)

and the forward pass forms `v` and `e` together, tile of vocabulary by tile: 3 products of size N*D*V, 2 without
gradient, one less when lse(b) is given; the backward pass only scales the rows of `e`. A soft-cap `c tanh(x / c)` on
the logits is not linear: then both logits of a tile are formed, and `e` gets the cap's derivative.

N rows, D hidden size, V vocabulary. Source: Li et al. 2024, https://arxiv.org/abs/2407.03856, eq. of the soft value;
the one-pass softmax is that of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from fastqadapter.ops import checks
from fastqadapter.ops.backends import Implementation, choose

# Sizes of one tile of scores: large enough for the GEMM to run at full speed, small enough for its fp32 copy to stay
# in the last-level cache while it is turned into probabilities.
ROW_BLOCK = 512
VOCAB_TILE = 1024


@dataclasses.dataclass(frozen=True)
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
        logits = logits + bias
    logits = params.logit_scale * logits
    return logits if params.softcap is None else params.softcap * torch.tanh(logits / params.softcap)


class _OnlineLogSumExp:
    """Log-sum-exp over tiles of columns; in training also the running sum of `softmax @ W`."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, expected_size: int | None):
        self.maximum = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        self.total = torch.zeros(rows, dtype=dtype, device=device)
        shape = None if expected_size is None else (rows, expected_size)
        self.expected = None if shape is None else torch.zeros(shape, dtype=dtype, device=device)

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
    block = _softcap_block if params.softcap is not None else _linear_block
    results = [
        block(
            hidden_q[rows], hidden_b[rows], weight, params, None if base_lse is None else base_lse[rows], with_gradient
        )
        for rows in (slice(start, start + ROW_BLOCK) for start in range(0, hidden_q.shape[0], ROW_BLOCK))
    ]
    values, lses, expected = zip(*results, strict=True)
    return torch.cat(values), torch.cat(lses), torch.cat(expected) if with_gradient else None


def _linear_block(
    hidden_q: Tensor,
    hidden_b: Tensor,
    weight: Tensor,
    params: HeadParams,
    base_lse: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One block of rows by identity 1: one product `[h_b; h_c] W^T` per tile reads the tile of `W` once."""
    dtype = checks.accumulation_dtype(weight.dtype)
    rows, scale = hidden_q.shape[0], params.logit_scale
    # h_c is formed in fp32 and rounded once; the same tensor serves the scores and, through them, e.
    combined = (hidden_q.to(dtype) + params.alpha_0 * hidden_b.to(dtype)) * (scale / params.alpha_tilde)
    stacked = [] if base_lse is not None else [(scale * hidden_b.to(dtype)).to(weight.dtype)]
    stacked_hidden = torch.cat([*stacked, combined.to(weight.dtype)])
    base_bias, combined_bias = _linear_biases(params, dtype)

    base = _OnlineLogSumExp(rows, dtype, weight.device, None)
    combined_sum = _OnlineLogSumExp(rows, dtype, weight.device, weight.shape[1] if with_gradient else None)
    for start in range(0, weight.shape[0], VOCAB_TILE):
        tile = weight[start : start + VOCAB_TILE]
        scores = F.linear(stacked_hidden, tile).to(dtype)
        base_scores, combined_scores = scores[:-rows], scores[-rows:]
        if base_lse is None:
            if base_bias is not None:
                base_scores.add_(base_bias[start : start + VOCAB_TILE])
            base.exponentiate_(base_scores)
        if combined_bias is not None:
            combined_scores.add_(combined_bias[start : start + VOCAB_TILE])
        probabilities = combined_sum.exponentiate_(combined_scores)
        if combined_sum.expected is not None:
            combined_sum.expected.add_(probabilities.to(weight.dtype) @ tile)
    return _finish(combined_sum, base, params, base_lse)


def _linear_biases(params: HeadParams, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Biases (V,) of the base scores and of the combined scores, times the logit scale; None where there is none."""
    scale = params.logit_scale
    base = None if params.bias is None else scale * params.bias.to(dtype)
    combined = None if base is None else params.alpha_0 * base / params.alpha_tilde
    if params.bias_q is not None:
        q_part = scale * params.bias_q.to(dtype) / params.alpha_tilde
        combined = q_part if combined is None else combined + q_part
    return base, combined


def _softcap_block(
    hidden_q: Tensor,
    hidden_b: Tensor,
    weight: Tensor,
    params: HeadParams,
    base_lse: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One block of rows where a soft-cap forbids identity 1: both logits of a tile, capped, then combined."""
    assert params.softcap is not None
    dtype, cap = checks.accumulation_dtype(weight.dtype), params.softcap
    rows = hidden_q.shape[0]
    stacked_hidden = torch.cat([hidden_b.to(weight.dtype), hidden_q.to(weight.dtype)])
    base = _OnlineLogSumExp(rows, dtype, weight.device, None)
    combined_sum = _OnlineLogSumExp(rows, dtype, weight.device, weight.shape[1] if with_gradient else None)
    for start in range(0, weight.shape[0], VOCAB_TILE):
        columns = slice(start, start + VOCAB_TILE)
        tile = weight[columns]
        scores = F.linear(stacked_hidden, tile).to(dtype)
        for part, bias in ((scores[:rows], params.bias), (scores[rows:], params.bias_q)):
            if bias is not None:
                part.add_(bias[columns])
        squashed = scores.mul_(params.logit_scale / cap).tanh_()
        base_tanh, q_tanh = squashed[:rows], squashed[rows:]
        weight_of_base = params.alpha_0 - (1.0 if params.difference else 0.0)
        combined = (q_tanh + weight_of_base * base_tanh).mul_(cap / params.alpha_tilde)
        probabilities = combined_sum.exponentiate_(combined)
        if combined_sum.expected is not None:
            probabilities.mul_(1.0 - q_tanh.square())  # d(c tanh(x / c)) / dx
            combined_sum.expected.add_(probabilities.to(weight.dtype) @ tile)
        if base_lse is None:
            base.exponentiate_(base_tanh.mul_(cap))
    return _finish(combined_sum, base, params, base_lse)


def _finish(
    combined: _OnlineLogSumExp, base: _OnlineLogSumExp, params: HeadParams, base_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    base_lse = base.result() if base_lse is None else base_lse.to(combined.total.dtype)
    value = params.alpha_tilde * combined.result() - params.alpha_0 * base_lse
    expected = combined.expected
    if expected is not None:
        expected = expected.mul_((params.logit_scale / combined.total)[:, None])
    return value, base_lse, expected


class SoftValueFunction(torch.autograd.Function):
    """`soft_value_fwd` with its gradient: `dd = g_v e`, a new tensor each time, so backward may run twice."""

    @staticmethod
    def forward(ctx, hidden_q, hidden_b, weight, params, base_lse):  # type: ignore[no-untyped-def]
        value, base_lse, expected = soft_value_fwd(
            hidden_q, hidden_b, weight, params, base_lse, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(expected)
        ctx.hidden_dtype = hidden_q.dtype
        ctx.mark_non_differentiable(base_lse)
        return value, base_lse

    @staticmethod
    def backward(ctx, grad_value, _):  # type: ignore[no-untyped-def]
        (expected,) = ctx.saved_tensors
        return (grad_value[:, None] * expected).to(ctx.hidden_dtype), None, None, None, None


IMPLEMENTATIONS = {"torch": Implementation(SoftValueFunction.apply), "eager": Implementation(soft_value_ref)}


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
        base_lse: (N,) lse of the base logits where it is known already; saves one product of size N*D*V.
        return_base_lse: also return that lse.
        backend: `auto`, `torch`, `eager` (or `triton`, `cpu` where the version has them).

    Returns:
        (N,) float32 (float64 for a float64 `weight`); with `return_base_lse` the pair `(v, base_lse)`. NaN or inf in
        a row gives NaN there.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a trainable `weight`, a number outside its range.
    """
    checks.check_weight(weight)
    checks.check_hidden("hidden_q", hidden_q, weight)
    checks.check_hidden("hidden_b", hidden_b, weight)
    checks.check_frozen("hidden_b", hidden_b)
    rows = hidden_q.shape[0]
    if hidden_b.shape[0] != rows:
        raise ValueError(f"hidden_b has {hidden_b.shape[0]} rows, hidden_q {rows}; expected the same states in both")
    for name, vector in (("bias", bias), ("bias_q", bias_q)):
        if vector is not None:
            checks.check_vector(name, vector, weight.shape[0], weight, "V")
    if base_lse is not None:
        checks.check_vector("base_lse", base_lse, rows, weight, "N")
    checks.check_alphas(alpha_0, alpha_tilde)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap!r} is outside its legal range (0, inf)")
    if not abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale={logit_scale!r} is not a finite number")
    if difference and softcap is None:
        raise ValueError("difference=True is for soft-capped logits; without softcap pass hidden_q = h_q - h_b")

    params = HeadParams(alpha_0, alpha_tilde, bias, bias_q, logit_scale, softcap, difference)
    args = (hidden_q, hidden_b, weight, params, base_lse)
    run = choose("soft_value", IMPLEMENTATIONS, backend, *args)
    if rows == 0:
        dtype = checks.accumulation_dtype(weight.dtype)
        value, lse = hidden_q.sum(dim=-1).to(dtype), torch.zeros(0, dtype=dtype, device=weight.device)
    else:
        value, lse = run(*args)
    return (value, lse) if return_base_lse else value
