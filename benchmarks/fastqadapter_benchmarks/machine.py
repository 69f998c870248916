"""The machine and the versions that a figure belongs to."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastqadapter
from fastqadapter_benchmarks.settings import Settings
from fastqadapter_kernels import native

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy")


@functools.cache
def describe(settings: Settings) -> dict[str, Any]:
    """Device, threads, kernels, versions, commit."""
    return {
        "device": torch.cuda.get_device_name() if settings.on_gpu else cpu_name(),
        "gpu": settings.on_gpu,
        "threads": settings.threads,
        "cores": os.cpu_count(),
        "kernels": settings.our_backend if settings.on_gpu else f"{settings.our_backend} ({native.cpu_isa()})",
        "versions": {name: version for name, version in versions().items() if name != "commit"},
        "commit": versions().get("commit"),
    }


def cpu_name() -> str:
    """As Linux calls it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name or 'unknown processor'} ({platform.machine()}, {capability})"


@functools.cache
def versions() -> dict[str, str]:
    """Of everything that has a part in a figure, and the commit of a checkout."""
    found = {"python": platform.python_version(), "fastqadapter": fastqadapter.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    checked_out = _commit()
    return found | ({"commit": checked_out} if checked_out else {})


def _commit() -> str | None:
    """Of the checkout that this file lies in, with a + where it was changed; None in an installed package."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if tracked.returncode:
            return None
        command = [*git, "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
