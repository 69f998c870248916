"""Memory of the current process, as Linux counts it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


def resident_mib(field: str) -> float:
    """Memory of this process: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Give freed memory back to the system, or a step would use it unseen, and start `VmHWM` anew."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # some containers forbid it: then the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
