"""The native CPU kernels, one function an op: tensors in, tensors out, as the launchers of the Triton kernels.

Each runs on as many threads as `torch.get_num_threads()` says, those of torch's own pool. It checks what it hands to
the library before any pointer is touched; what the numbers mean has been checked by `fastqadapter.ops`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastqadapter_kernels.native import native_library
from fastqadapter_kernels.preference_metrics import METRICS

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT64 = ctypes.c_int64
_FLOAT = ctypes.c_float
_POINTER = ctypes.c_void_p


# --- what crosses the border: the structs of kernels/csrc/cpu/api.h --------------------------------------------------


class _Matrix(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("row_stride", _INT64), ("column_stride", _INT64), ("dtype", ctypes.c_int32)]


class _SoftValueCall(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("hidden_q", "hidden_b", "weight")),
        *((name, _INT64) for name in ("rows", "size", "vocab")),
        *((name, _POINTER) for name in ("bias_b", "bias_q", "base_lse")),
        *((name, _FLOAT) for name in ("alpha_0", "alpha_tilde", "logit_scale", "softcap")),
        ("difference", ctypes.c_int32),
        *((name, _POINTER) for name in ("value", "lse", "expected")),
    ]


class _TakenValueCall(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("hidden", "weight")),
        *((name, _INT64) for name in ("rows", "size", "vocab", "transitions")),
        *((name, _POINTER) for name in ("states", "actions", "value")),
    ]


class _HiddenGradientCall(ctypes.Structure):
    _fields_ = [
        ("weight", _Matrix),
        *((name, _INT64) for name in ("rows", "size", "vocab", "transitions")),
        *((name, _POINTER) for name in ("actions", "order", "ends", "grad_value", "expected", "grad_taken")),
        *(("gradient", _POINTER), ("dtype", ctypes.c_int32)),
    ]


class _ResidualCall(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("q_logits", "base_logits")),
        *((name, _INT64) for name in ("rows", "vocab")),
        *((name, _FLOAT) for name in ("alpha_0", "alpha_tilde")),
        *((name, _POINTER) for name in ("value", "lse")),
    ]


class _ResidualBackwardCall(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("q_logits", "base_logits", "log_probs", "grad")),
        *((name, _POINTER) for name in ("lse", "grad_value")),
        *((name, _INT64) for name in ("rows", "vocab")),
        *((name, _FLOAT) for name in ("alpha_0", "alpha_tilde")),
        *(("gradient", _POINTER), ("dtype", ctypes.c_int32)),
    ]


class _PreferenceLossCall(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("q_taken", "values", "value_rows", "branch_ends")),
        *((name, _POINTER) for name in ("divisor", "squares_divisor")),
        *((name, _INT64) for name in ("transitions", "rows", "pairs")),
        *((name, ctypes.c_double) for name in ("gamma", "beta")),
        *((name, _POINTER) for name in ("loss", "metrics", "grad_q", "grad_values")),
    ]


# --- checks -----------------------------------------------------------------------------------------------------------


def _refuse(name: str, tensor: Tensor, expected: str) -> ValueError:
    found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"
    if tensor.layout != torch.strided:
        found += f", {tensor.layout}"
    elif not tensor.is_contiguous():
        found += f", strides {tensor.stride()}"
    return ValueError(f"{name} is {found}; the CPU kernels expect {expected}")


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == torch.strided


def _matrix(name: str, tensor: Tensor, rows: int, columns: int, dtype: torch.dtype | None = None) -> _Matrix:
    """A matrix with any strides, of one of the three dtypes or of `dtype`."""
    dtypes = tuple(_DTYPES) if dtype is None else (dtype,)
    if not _on_cpu(tensor) or tuple(tensor.shape) != (rows, columns) or tensor.dtype not in dtypes:
        names = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
        raise _refuse(name, tensor, f"{names} ({rows}, {columns}) on cpu")
    return _Matrix(tensor.data_ptr(), *tensor.stride(), _DTYPES[tensor.dtype])


def _vector(name: str, tensor: Tensor, length: int, dtype: torch.dtype = torch.float32) -> int:
    """The address of a contiguous vector."""
    if not _on_cpu(tensor) or tuple(tensor.shape) != (length,) or tensor.dtype != dtype or not tensor.is_contiguous():
        raise _refuse(name, tensor, f"contiguous {str(dtype).removeprefix('torch.')} ({length},) on cpu")
    return tensor.data_ptr()


def _vector_or_none(name: str, tensor: Tensor | None, length: int, dtype: torch.dtype = torch.float32) -> int | None:
    return None if tensor is None else _vector(name, tensor, length, dtype)


def _index(name: str, index: Tensor) -> Tensor:
    """int64 of int64 or int32."""
    if index.dtype not in (torch.int64, torch.int32):
        raise _refuse(name, index, "int64 or int32")
    return index.long()


def _function(name: str) -> Callable[..., Any]:
    library = native_library()
    if library is None:
        raise RuntimeError("the native CPU library is missing or cannot be used: `fastqadapter env` says what to do")
    return getattr(library, name)


def _per_row(rows: int) -> Tensor:
    return torch.empty(rows, dtype=torch.float32, device="cpu")


# --- the ops ----------------------------------------------------------------------------------------------------------


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
    expected: Tensor | None = None,  # (N, D) fp32, contiguous
) -> tuple[Tensor, Tensor]:  # v (N,), lse(b) (N,), fp32
    """v and lse(b); writes e = dv/dhidden_q into `expected` where it is one."""
    vocab, size = weight.shape
    rows = hidden_q.shape[0]
    value, lse = _per_row(rows), _per_row(rows)
    # Whatever float dtype the biases have: V numbers, beside the V D of the weight.
    bias_b, bias_q = (None if bias is None else bias.float().contiguous() for bias in (bias_b, bias_q))
    call = _SoftValueCall(
        _matrix("hidden_q", hidden_q, rows, size), _matrix("hidden_b", hidden_b, rows, size),
        _matrix("weight", weight, vocab, size), rows, size, vocab,
        _vector_or_none("bias_b", bias_b, vocab), _vector_or_none("bias_q", bias_q, vocab),
        _vector_or_none("base_lse", base_lse, rows),
        alpha_0, alpha_tilde, logit_scale, float("inf") if softcap is None else softcap, difference,
        value.data_ptr(), lse.data_ptr(),
        None if expected is None else _vector("expected", expected.view(-1), rows * size),
    )  # fmt: skip
    if _function("fqa_soft_value")(ctypes.byref(call), torch.get_num_threads()) != 0:
        raise MemoryError(f"no memory for the scratch of soft_value, N={rows}, D={size}, V={vocab}")
    return value, lse


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
) -> tuple[Tensor, Tensor, Tensor]:  # v (N,), lse(b) (N,), e (N, D), fp32
    """v, lse(b) and e = dv/dhidden_q."""
    expected = torch.empty(tuple(hidden_q.shape), dtype=torch.float32, device="cpu")
    value, lse = soft_value_lse(
        hidden_q, hidden_b, weight, bias_b, bias_q, base_lse,
        alpha_0, alpha_tilde, logit_scale, softcap, difference, expected,
    )  # fmt: skip
    return value, lse, expected


def taken_value(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    actions: Tensor,  # (M,)
    states: Tensor | None = None,  # (M,) rows of hidden; None: row t for transition t
) -> Tensor:  # (M,) fp32; NaN for an action outside the vocabulary, or a state outside
    """`W[a_t] . hidden[s_t]`."""
    (rows, size), vocab, transitions = hidden.shape, weight.shape[0], actions.shape[0]
    actions, states = _index("actions", actions), None if states is None else _index("states", states)
    value = _per_row(transitions)
    call = _TakenValueCall(
        _matrix("hidden", hidden, rows, size), _matrix("weight", weight, vocab, size), rows, size, vocab, transitions,
        _vector_or_none("states", states, transitions, torch.int64),
        _vector("actions", actions, transitions, torch.int64), value.data_ptr(),
    )  # fmt: skip
    _function("fqa_taken_value")(ctypes.byref(call), torch.get_num_threads())
    return value


def hidden_gradient(
    grad_value: Tensor | None,  # (N,)
    expected: Tensor | None,  # (N, D) fp32
    grad_taken: Tensor,  # (M,)
    weight: Tensor,  # (V, D)
    actions: Tensor,  # (M,)
    order: Tensor,  # (M,) transitions sorted by state: those of state s are order[ends[s]:ends[s + 1]]
    ends: Tensor,  # (N + 1,)
    dtype: torch.dtype,
) -> Tensor:  # (N, D) in `dtype`
    """`g_v e + sum g_x W[a]` over the transitions of each state."""
    (vocab, size), rows, transitions = weight.shape, ends.shape[0] - 1, actions.shape[0]
    gradient = torch.empty((rows, size), dtype=dtype, device="cpu")
    if (grad_value is None) != (expected is None):
        raise ValueError("grad_value and expected come together: one of them is None")
    if expected is not None:
        _matrix("expected", expected, rows, size, torch.float32)
        expected = expected.contiguous()
    actions, order, ends = _index("actions", actions), _index("order", order), _index("ends", ends)
    call = _HiddenGradientCall(
        _matrix("weight", weight, vocab, size), rows, size, vocab, transitions,
        _vector("actions", actions, transitions, torch.int64), _vector("order", order, transitions, torch.int64),
        _vector("ends", ends, rows + 1, torch.int64), _vector_or_none("grad_value", grad_value, rows),
        None if expected is None else expected.data_ptr(), _vector("grad_taken", grad_taken, transitions),
        gradient.data_ptr(), _matrix("gradient", gradient, rows, size).dtype,
    )  # fmt: skip
    _function("fqa_hidden_gradient")(ctypes.byref(call), torch.get_num_threads())
    return gradient


def _logits(name: str, logits: Tensor, rows: int, vocab: int, dtype: torch.dtype | None = None) -> _Matrix:
    """A matrix whose columns are neighbours: the logit-level kernels have no other form."""
    matrix = _matrix(name, logits, rows, vocab, dtype)
    if vocab > 1 and logits.stride(1) != 1:
        raise _refuse(name, logits, "neighbouring columns")
    return matrix


def residual_soft_value(
    q_logits: Tensor,  # (N, V), neighbouring columns
    base_logits: Tensor,  # (N, V), neighbouring columns
    alpha_0: float,
    alpha_tilde: float,
) -> tuple[Tensor, Tensor]:  # v (N,), lse (N,) for the backward pass alone, fp32
    rows, vocab = q_logits.shape
    value, lse = _per_row(rows), _per_row(rows)
    call = _ResidualCall(
        _logits("q_logits", q_logits, rows, vocab), _logits("base_logits", base_logits, rows, vocab, q_logits.dtype),
        rows, vocab, alpha_0, alpha_tilde, value.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    _function("fqa_residual_soft_value")(ctypes.byref(call), torch.get_num_threads())
    return value, lse


def residual_log_probs(
    q_logits: Tensor,  # (N, V), neighbouring columns
    base_logits: Tensor,  # (N, V), neighbouring columns
    alpha_0: float,
    alpha_tilde: float,
) -> Tensor:  # (N, V) fp32
    rows, vocab = q_logits.shape
    log_probs = torch.empty((rows, vocab), dtype=torch.float32, device="cpu")
    call = _ResidualCall(
        _logits("q_logits", q_logits, rows, vocab), _logits("base_logits", base_logits, rows, vocab, q_logits.dtype),
        rows, vocab, alpha_0, alpha_tilde, log_probs.data_ptr(), None,
    )  # fmt: skip
    _function("fqa_residual_log_probs")(ctypes.byref(call), torch.get_num_threads())
    return log_probs


def residual_soft_value_bwd(
    q_logits: Tensor,  # (N, V), neighbouring columns
    base_logits: Tensor,  # (N, V), neighbouring columns
    lse: Tensor,  # (N,)
    grad_value: Tensor,  # (N,)
    alpha_0: float,
    alpha_tilde: float,
) -> Tensor:  # (N, V), in the dtype of q_logits
    rows, vocab = q_logits.shape
    gradient = torch.empty((rows, vocab), dtype=q_logits.dtype, device="cpu")
    call = _ResidualBackwardCall(
        q_logits=_logits("q_logits", q_logits, rows, vocab),
        base_logits=_logits("base_logits", base_logits, rows, vocab, q_logits.dtype),
        lse=_vector("lse", lse, rows), grad_value=_vector("grad_value", grad_value, rows),
        rows=rows, vocab=vocab, alpha_0=alpha_0, alpha_tilde=alpha_tilde,
        gradient=gradient.data_ptr(), dtype=_DTYPES[gradient.dtype],
    )  # fmt: skip
    _function("fqa_residual_soft_value_bwd")(ctypes.byref(call), torch.get_num_threads())
    return gradient


def residual_log_probs_bwd(
    log_probs: Tensor,  # (N, V) fp32, neighbouring columns
    grad: Tensor,  # (N, V) fp32, neighbouring columns
    alpha_tilde: float,
    dtype: torch.dtype,
) -> Tensor:  # (N, V) in `dtype`
    rows, vocab = log_probs.shape
    gradient = torch.empty((rows, vocab), dtype=dtype, device="cpu")
    call = _ResidualBackwardCall(
        log_probs=_logits("log_probs", log_probs, rows, vocab, torch.float32),
        grad=_logits("grad", grad, rows, vocab, torch.float32),
        rows=rows, vocab=vocab, alpha_tilde=alpha_tilde,
        gradient=gradient.data_ptr(), dtype=_logits("gradient", gradient, rows, vocab).dtype,
    )  # fmt: skip
    _function("fqa_residual_log_probs_bwd")(ctypes.byref(call), torch.get_num_threads())
    return gradient


def preference_loss(
    q_taken: Tensor,  # (M,) fp32
    values: Tensor,  # (S,) fp32
    value_rows: Tensor,  # (M,) int64 or int32
    branch_ends: Tensor,  # (2B + 1,) int64 or int32
    divisor: Tensor,  # (B,)
    squares_divisor: Tensor,  # (B,)
    gamma: float,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (), (8, B), (M,), (S,)
    """Loss, metrics in the order of METRICS, and gradients. One thread: it takes microseconds."""
    transitions, rows, pairs = q_taken.shape[0], values.shape[0], divisor.shape[0]
    value_rows, branch_ends = _index("value_rows", value_rows), _index("branch_ends", branch_ends)
    divisor, squares_divisor = divisor.float(), squares_divisor.float()
    loss = torch.empty((), dtype=torch.float32, device="cpu")
    metrics = torch.empty((len(METRICS), pairs), dtype=torch.float32, device="cpu")
    grad_q, grad_values = _per_row(transitions), _per_row(rows)
    call = _PreferenceLossCall(
        _vector("q_taken", q_taken, transitions), _vector("values", values, rows),
        _vector("value_rows", value_rows, transitions, torch.int64),
        _vector("branch_ends", branch_ends, 2 * pairs + 1, torch.int64),
        _vector("divisor", divisor, pairs), _vector("squares_divisor", squares_divisor, pairs),
        transitions, rows, pairs, gamma, beta,
        loss.data_ptr(), metrics.data_ptr(), grad_q.data_ptr(), grad_values.data_ptr(),
    )  # fmt: skip
    _function("fqa_preference_loss")(ctypes.byref(call))
    return loss, metrics, grad_q, grad_values
