"""A try of each op on the device before `auto` hands it real work.

A kernel that does not compile, or computes something else, with this GPU, driver and Triton must cost speed and not a
training run: `auto` then goes on with the next backend, and says so once. The try takes a few small launches for each
op, device and dtype in a process.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastqadapter.ops.backends import Implementation
from fastqadapter.ops.preference_loss import IMPLEMENTATIONS as PREFERENCE_LOSS
from fastqadapter.ops.preference_loss import Pairs
from fastqadapter.ops.residual import LOG_PROBS
from fastqadapter.ops.residual import SOFT_VALUE as RESIDUAL_SOFT_VALUE
from fastqadapter.ops.soft_value import IMPLEMENTATIONS as SOFT_VALUE
from fastqadapter.ops.soft_value import HeadParams
from fastqadapter.ops.state_action_values import IMPLEMENTATIONS as STATE_ACTION_VALUES
from fastqadapter.ops.taken_value import IMPLEMENTATIONS as TAKEN_VALUE
from fastqadapter.testing import assert_close_to_truth

logger = logging.getLogger(__name__)

# More rows, columns and vocabulary than one tile of any configuration has, and none of them a multiple of it.
ROWS, SIZE, VOCAB, PAIRS = 150, 328, 3000, 4


@torch.compiler.assume_constant_result
@functools.cache
def failure(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the kernels of `op` agree with eager on this device, else what went wrong (logged once)."""
    try:
        # Whatever surrounds the first call must not decide: evaluation, autocast, a default device.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            _TRIES[op](device, dtype)
    except Exception as error:  # of the compiler, the driver, or an assertion
        lines = str(error).strip().splitlines()
        reason = f"its first use on {device} failed: {type(error).__name__}: {lines[0] if lines else ''}"
        logger.warning("%s: the Triton kernels are not used: %s", op, reason)
        return reason
    return None


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu").to(device, dtype)


def _compare(implementations: Mapping[str, Implementation], *arguments: Any) -> None:
    """Results with and without gradient, and the gradient of the first argument, of triton against eager."""

    def run(backend: str, arguments: tuple[Any, ...]) -> list[Tensor]:
        first, *others = arguments
        with torch.no_grad():
            plain = _tensors(implementations[backend].run(first, *others))
        first = first.detach().requires_grad_()
        results = _tensors(implementations[backend].run(first, *others))
        uneven = (torch.linspace(-1, 2, result.numel(), device=result.device) for result in results)
        pairs = zip(results, uneven, strict=True)
        total = torch.stack([(r.flatten() * w).sum() for r, w in pairs if r.requires_grad]).sum()
        return [*plain, *(result.detach() for result in results), *torch.autograd.grad(total, first)]

    truth = run("eager", tuple(_in_float64(argument) for argument in arguments))
    for index, three in enumerate(zip(run("triton", arguments), run("eager", arguments), truth, strict=True)):
        assert_close_to_truth(*three, name=f"result {index}", dtype=arguments[0].dtype)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]


def _in_float64(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.double() if argument.is_floating_point() else argument
    if dataclasses.is_dataclass(argument) and not isinstance(argument, type):
        fields = {field.name: _in_float64(getattr(argument, field.name)) for field in dataclasses.fields(argument)}
        return dataclasses.replace(argument, **fields)
    return argument


def _states_and_head(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[HeadParams]]:
    hidden_q, hidden_b = _normal(device, dtype, 2, ROWS, SIZE).unbind()
    bias = _normal(device, dtype, VOCAB)
    heads = [HeadParams(0.7, 1.3), HeadParams(0.7, 1.3, bias, bias, 0.9, 3.0, True)]
    return hidden_q, hidden_b, _normal(device, dtype, VOCAB, SIZE) / SIZE**0.5, heads


def _transitions(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two transitions of the first state, one of each other."""
    states = torch.arange(-1, ROWS, device=device).clamp(min=0)
    return states, (states * 7919) % VOCAB


def _try_soft_value(device: torch.device, dtype: torch.dtype) -> None:
    *states, heads = _states_and_head(device, dtype)
    known = torch.full((ROWS,), 8.0, device=device)
    for head, base_lse in ((heads[0], None), (heads[0], known), (heads[1], None)):
        _compare(SOFT_VALUE, *states, head, base_lse)


def _try_state_action_values(device: torch.device, dtype: torch.dtype) -> None:
    *states, heads = _states_and_head(device, dtype)
    for base_lse in (None, torch.full((ROWS,), 8.0, device=device)):
        _compare(STATE_ACTION_VALUES, *states, heads[0], *_transitions(device), base_lse)


def _try_taken_value(device: torch.device, dtype: torch.dtype) -> None:
    hidden_q, _, weight, _ = _states_and_head(device, dtype)
    rows, actions = _transitions(device)
    _compare(TAKEN_VALUE, hidden_q[rows], weight, actions)


def _try_residual(implementations: Mapping[str, Implementation], device: torch.device, dtype: torch.dtype) -> None:
    for vocab in (VOCAB, 13 * VOCAB):  # rows in one tile and in several
        q_logits, base_logits = _normal(device, dtype, 2, 3, vocab).unbind()
        _compare(implementations, q_logits, base_logits, 0.7, 1.3)


def _try_preference_loss(device: torch.device, dtype: torch.dtype) -> None:
    rows = torch.arange(ROWS, device=device)
    ends = torch.linspace(0, ROWS, 2 * PAIRS + 1, device=device).long()
    numbers = _normal(device, torch.float32, 2, PAIRS).abs() + 1.0
    pairs = Pairs(torch.where(rows % 5 == 0, -1, rows), ends, *numbers)
    q_taken, values = _normal(device, torch.float32, 2, ROWS)
    _compare(PREFERENCE_LOSS, q_taken, values, pairs, 0.9, 0.1)


_TRIES: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "soft_value": _try_soft_value,
    "state_action_values": _try_state_action_values,
    "taken_value": _try_taken_value,
    "residual_log_probs": functools.partial(_try_residual, LOG_PROBS),
    "residual_soft_value": functools.partial(_try_residual, RESIDUAL_SOFT_VALUE),
    "preference_loss": _try_preference_loss,
}
