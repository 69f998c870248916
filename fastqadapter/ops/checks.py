"""Argument checks shared by the ops. They look at shapes, dtypes, devices and Python numbers alone: no check reads a
tensor on an accelerator, because that would wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any of `dtypes` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_number(name: str, number: object) -> None:
    """Raise a ValueError unless `number` is a Python number: one in a tensor would have to be read from the device, and
    its gradient would be lost."""
    if not isinstance(number, (int, float, torch.SymFloat, torch.SymInt)):
        raise ValueError(f"{name}={number!r} is no Python number: pass float({name})")


def check_alphas(alpha_0: float, alpha_tilde: float) -> None:
    """Raise a ValueError unless alpha_0 is in [0, inf) and alpha_tilde in (0, inf)."""
    check_number("alpha_0", alpha_0)
    check_number("alpha_tilde", alpha_tilde)
    # Comparisons, since torch.compile knows no isfinite of a number that changes from call to call.
    if not 0 <= alpha_0 < float("inf"):
        raise ValueError(f"alpha_0={alpha_0!r} is outside its legal range [0, inf)")
    if not 0 < alpha_tilde < float("inf"):
        raise ValueError(f"alpha_tilde={alpha_tilde!r} is outside its legal range (0, inf)")


def check_weight(weight: Tensor) -> None:
    """Raise a ValueError unless `weight` is a frozen floating (V, D) matrix."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (V, D) with V >= 1 and D >= 1")
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight has dtype {weight.dtype}; expected one of {', '.join(map(str, FLOATS))}")
    if weight.requires_grad:
        raise ValueError(
            "weight.requires_grad=True, but the LM head is frozen in this method (no gradient for it is ever formed): "
            "call weight.requires_grad_(False), and do not train or adapt the LM head"
        )


def check_hidden(name: str, hidden: Tensor, weight: Tensor) -> None:
    """Raise a ValueError unless `hidden` is (N, D), on the device of `weight`, in its dtype or in float32."""
    if hidden.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(hidden.shape)}; expected (N, D) with D = {weight.shape[1]} of weight"
        )
    if hidden.dtype != weight.dtype and (hidden.dtype != torch.float32 or weight.dtype == torch.float64):
        allowed = f"{weight.dtype} (as weight)" + (" or torch.float32" if weight.dtype.itemsize == 2 else "")
        raise ValueError(f"{name} has dtype {hidden.dtype}; expected {allowed}")
    check_device(name, hidden, weight)


def check_device(name: str, tensor: Tensor, weight: Tensor, reference: str = "weight") -> None:
    """Raise a ValueError unless `tensor` lies on the device of `weight`."""
    if tensor.device != weight.device:
        raise ValueError(f"{name} is on {tensor.device}, {reference} on {weight.device}; expected one device for both")


def check_frozen(name: str, tensor: Tensor) -> None:
    """Raise a ValueError if `tensor`, which belongs to the frozen base model, asks for a gradient."""
    if tensor.requires_grad:
        raise ValueError(f"{name}.requires_grad=True, but the base model is frozen: pass {name}.detach()")


def check_vector(name: str, tensor: Tensor, length: int, weight: Tensor, letter: str) -> None:
    """Raise a ValueError unless `tensor` is a floating vector of `length` entries on the device of `weight`."""
    if tuple(tensor.shape) != (length,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({letter},) = ({length},)")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected one of {', '.join(map(str, FLOATS))}")
    check_device(name, tensor, weight)
    check_frozen(name, tensor)


def check_index(name: str, index: Tensor, stop: int, what: str) -> None:
    """Raise a ValueError for a number outside [0, stop) in a CPU tensor; elsewhere reading it would wait for the
    device, and under `torch.compile` break the graph."""
    if index.device.type != "cpu" or not index.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= stop:
        raise ValueError(f"{name} {low if low < 0 else high} is outside {what} [0, {stop})")


def check_actions(actions: Tensor, rows: int, weight: Tensor, letter: str = "N") -> None:
    """Raise a ValueError unless `actions` holds one token of the vocabulary for each row.

    The range is read on CPU tensors alone, and not under `torch.compile`; elsewhere an action outside gives NaN (see
    `taken_value`).
    """
    if actions.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"actions has dtype {actions.dtype}; expected torch.int64 or torch.int32")
    if tuple(actions.shape) != (rows,):
        raise ValueError(f"actions has shape {tuple(actions.shape)}; expected ({letter},) = ({rows},)")
    check_device("actions", actions, weight)
    check_index("action", actions, weight.shape[0], "the vocabulary")
