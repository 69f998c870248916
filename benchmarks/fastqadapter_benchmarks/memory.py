"""Peak memory of one call beyond its inputs: resident memory of a process of its own, or what CUDA's allocator says."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
# What the server of child processes imports once, and each child then has: the time of a child is a second, not ten.
# Nothing of these starts a thread, which would be missing in the children.
PRELOAD = [
    *("torch", "torch._inductor.compile_fx", "transformers", "transformers.models.llama.modeling_llama", "peft"),
    *("trl.trainer.dpo_trainer", "trl.kernels.chunked_logprob", "liger_kernel.chunked_loss", "cut_cross_entropy"),
]


def failure(error: Exception) -> str:
    """For a table."""
    return f"fails here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def resident_mib(field: str) -> float:
    """Memory of this process: `VmRSS` now, `VmHWM` at its peak."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Give freed memory back to the system, or a call would use it unseen, and start `VmHWM` anew."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # some containers forbid it: then the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


Build = Callable[[], Callable[[], Any]]


def peaks_of(builds: Mapping[str, Build], device: str, threads: int) -> dict[str, float | str]:
    """Peak MiB of the call that each `build` makes, beyond what was there before it, on its second run; or why not.

    On a CPU, a `build` must be a partial of a function of a module: it runs in a process of its own, after the others
    (two at once took 30 times as long).
    """
    if device != "cpu":
        return {label: _cuda_peak(build) for label, build in builds.items()}
    return {label: extra_of_a_child(build, threads) for label, build in builds.items()}


def extra_of_a_child(build: Build, threads: int) -> float | str:
    if not STATUS.exists():
        return "this system does not tell the peak of a process"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_resident_peak, build, threads).result()
    except BrokenProcessPool:
        return "its process was killed, for memory as it seems"
    except Exception as error:
        return failure(error)


def _resident_peak(build: Build, threads: int) -> float | str:
    torch.set_num_threads(threads)
    run = build()
    run()  # lazy imports, compilers, thread pools, mapped weights
    forget_peak()
    before = resident_mib("VmRSS")
    if resident_mib("VmHWM") - before > 16:
        return "this system does not let a process forget its peak"
    run()
    return resident_mib("VmHWM") - before


def _cuda_peak(build: Build) -> float | str:
    try:
        run = build()
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return "out of memory beside the others"
    except Exception as error:
        return failure(error)
    return (torch.cuda.max_memory_allocated() - before) / 2**20
