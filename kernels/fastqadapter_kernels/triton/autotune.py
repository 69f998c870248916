"""Opt-in measurement of configurations: FASTQADAPTER_AUTOTUNE=1.

By default every configuration comes from a rule: the same bits on every machine, no pause at the first call. With the
environment variable set, the first call of an op for a kind of problem times the rule's choice and its alternatives,
and the fastest is kept, also on disk: ~/.cache/fastqadapter/autotune.json (under XDG_CACHE_HOME where that is set).
Delete the file to measure anew.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "FASTQADAPTER_AUTOTUNE"
Config = TypeVar("Config")
_chosen: dict[str, Any] = {}  # in this process, so that a file that cannot be written costs one measurement


def enabled() -> bool:
    return os.environ.get(ENVIRONMENT_VARIABLE, "").lower() not in ("", "0", "false", "off", "no")


def cache_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastqadapter" / "autotune.json"


def measure(run: Callable[[], Any]) -> float:
    """Median time of `run` in ms."""
    return triton.testing.do_bench(run, warmup=25, rep=100, return_mode="median")


def best(
    op: str,
    device: torch.device,
    problem: Sequence[object],
    candidates: Sequence[Config],
    run: Callable[[Config], Any],
) -> Config:
    """The fastest of `candidates`, dataclasses of one kind, of which the first is the rule's; measured once for each
    op, device and `problem` (what the choice may depend on)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    key = " ".join(map(str, (op, name.replace(" ", "_"), f"triton-{triton.__version__}", *problem)))
    if key in _chosen:
        return _chosen[key]
    known = _read().get(key)
    for candidate in candidates:
        if known == dataclasses.asdict(candidate):  # type: ignore[call-overload]
            return _chosen.setdefault(key, candidate)
    times = [_time(run, candidate) for candidate in candidates]
    fastest = _chosen[key] = candidates[times.index(min(times))]
    if min(times) == math.inf:
        return fastest
    logger.info("autotune: %s: %s in %.3g ms, the rule's in %.3g ms", key, fastest, min(times), times[0])
    _write({**_read(), key: dataclasses.asdict(fastest)})  # type: ignore[call-overload]
    return fastest


def _time(run: Callable[[Config], Any], candidate: Config) -> float:
    try:
        return measure(lambda: run(candidate))
    except Exception as error:  # a configuration may ask for more than the device has
        logger.info("autotune: %s cannot run: %s", candidate, str(error).strip().splitlines()[:1])
        return math.inf


def _read() -> dict[str, Any]:
    try:
        content = json.loads(cache_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("autotune: %s cannot be read and will be written anew: %s", cache_path(), error)
        return {}
    return content if isinstance(content, dict) else {}


def _write(content: dict[str, Any]) -> None:
    """In one step, so that a process killed or another one reading meets a whole file."""
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("autotune: %s cannot be written: %s", path, error)
