"""Which implementation of an op serves a call: `auto` takes the fastest that can, a named backend serves or raises.

Order of preference: `triton` (GPU kernels), `cpu` (native kernels), `torch` (chunked, any device), `eager` (plain
formulas, the truth of all tests).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

BACKENDS = ("triton", "cpu", "torch", "eager")
ENVIRONMENT_VARIABLE = "FASTQADAPTER_BACKEND"

# Reasons of the backends that have no kernels yet; they serve no op.
_ABSENT = {
    "triton": "this version has no Triton kernels yet",
    "cpu": "this version has no native CPU kernels yet",
}


def _serves_everything(*args: Any, **kwargs: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One op on one backend. `refusal(*args, **kwargs)` is None, or why this call cannot be served."""

    run: Callable[..., Any]
    refusal: Callable[..., str | None] = _serves_everything


def backends() -> dict[str, str | None]:
    """Every backend name with None where it can be used, else the reason why it cannot."""
    return {name: _ABSENT.get(name) for name in BACKENDS}


def choose(
    op: str, implementations: Mapping[str, Implementation], backend: str, *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """The function that serves this call of `op`.

    `implementations` is keyed by backend, the fastest first. `backend="auto"` reads the environment variable
    FASTQADAPTER_BACKEND, then takes the first implementation that does not refuse, and logs each refusal once.

    Raises:
        ValueError: an unknown backend, or a named one that cannot serve this call; with the reason.
    """
    asked = "backend"
    if backend == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        asked, backend = ENVIRONMENT_VARIABLE, os.environ[ENVIRONMENT_VARIABLE]
    if backend == "auto":
        for name, implementation in implementations.items():
            reason = implementation.refusal(*args, **kwargs)
            if reason is None:
                return implementation.run
            _log_refusal_once(op, name, reason)
        raise ValueError(f"no backend can serve this call of {op}")
    if backend not in BACKENDS:
        raise ValueError(f"{asked}={backend!r} is not one of 'auto', {', '.join(map(repr, BACKENDS))}")
    if backend not in implementations:
        reason = _ABSENT.get(backend) or f"it has no {op}"
    else:
        reason = implementations[backend].refusal(*args, **kwargs)
    if reason is not None:
        raise ValueError(f"{asked}={backend!r} cannot serve {op}: {reason}")
    return implementations[backend].run


@functools.cache
def _log_refusal_once(op: str, backend: str, reason: str) -> None:
    logger.info("%s: backend %r passed over: %s", op, backend, reason)
