"""The native CPU kernels, forward and backward, against the published way, bare GEMMs and the kernels of others.

    pytest benchmarks/test_cpu_kernels.py
    pytest benchmarks/test_cpu_kernels.py -k "bfloat16 and SmolLM2" --benchmark-json cpu.json

Every round calls all competitors once, one after the other, in one process, so that a slow moment of the machine hits
all; a ratio is the median over rounds of the two times of one round. pytest-benchmark's own table has our times; the
others are in `extra_info`. No time is taken before the gradients agree with eager in float64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.memory import forget_peak, resident_mib
from benchmarks.peers import lm_head
from benchmarks.peers.lm_head import Problem
from fastqadapter.testing import assert_close_to_truth
from fastqadapter_kernels import native

pytestmark = pytest.mark.skipif(native.native_library() is None, reason="no native library: no C++ compiler was found")

# N, D, V of two heads: SmolLM2-135M and Llama-3.2-1B.
SHAPES = {"SmolLM2": (1024, 576, 49152), "Llama-3.2": (512, 2048, 128256)}
ROUNDS = 5
OURS, GEMMS, PUBLISHED = "cpu", "3 bare GEMMs", "published"
LIGER_PAIRS = 8
# What the ratio to each competitor has to be, at least; None: only reported.
BARS = {
    PUBLISHED: 4.0,
    GEMMS: 1 / 1.2,
    "TRL twice": 1.0,
    "torch's twice": 1.0,
    "Liger DPO": 1.0,
    "Liger DPO, all pairs at once": 1.0,
}


@pytest.fixture(params=[2, 1], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def competitors(problem: Problem) -> dict[str, Callable[[], Any]]:
    return {
        OURS: lm_head.backend(problem, "cpu"),
        GEMMS: lm_head.bare_products(problem),
        PUBLISHED: lm_head.published(problem),
        "torch backend": lm_head.backend(problem, "torch"),
        # With the sizes of chunks that are fastest here: their own choices took 1.7 and 2.1 times as long.
        "TRL twice": lm_head.trl_twice(problem, 4096),
        "torch's twice": lm_head.torch_twice(problem, 512),
        "Liger DPO": lm_head.liger_dpo(problem, LIGER_PAIRS, 1),
        "Liger DPO, all pairs at once": lm_head.liger_dpo(problem, LIGER_PAIRS, LIGER_PAIRS),
    }


def check(problem: Problem) -> None:
    """Ours agrees with eager in float64 on some rows; others may be off by what they round, 5% of the gradient."""
    few, truth = problem.first(16, problem.weight.dtype), lm_head.backend(problem.first(16, torch.float64), "eager")()
    eager = lm_head.backend(few, "eager")()
    for name, *three in zip(("v", "x", "gradient"), lm_head.backend(few, "cpu")(), eager, truth, strict=True):
        assert_close_to_truth(*three, name=name, dtype=few.weight.dtype)
    for call in (lm_head.published, lm_head.trl_twice, lm_head.torch_twice):
        error = (call(few)()[2].double() - truth[2]).norm() / truth[2].norm()
        assert error < 0.05, f"{call.__name__} computes something else: its gradient is off by {error:.1%}"


def extra_memory(run: Callable[[], Any]) -> float:
    """Peak MiB of one call beyond its results."""
    run()
    forget_peak()
    before = resident_mib("VmRSS")
    results = run()
    return resident_mib("VmHWM") - before - sum(x.nbytes for x in results) / 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark: Any, shape: str, dtype: torch.dtype, threads: int, report: list[str]) -> None:
    problem = Problem.make(*SHAPES[shape], dtype)
    check(problem)
    calls = competitors(problem)
    for run in calls.values():  # compilers, thread pools, pages of memory
        run()
    memory = extra_memory(calls[OURS])
    times: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> None:
        start = time.perf_counter()
        calls[name]()
        times[name].append(time.perf_counter() - start)

    def others() -> None:
        for name in calls:
            if name != OURS:
                timed(name)

    benchmark.pedantic(lambda: timed(OURS), setup=others, rounds=ROUNDS)

    ratios = {
        name: statistics.median(theirs / ours for theirs, ours in zip(seconds, times[OURS], strict=True))
        for name, seconds in times.items()
    }
    report.append(
        f"{shape}, {str(dtype).removeprefix('torch.')}, {threads} threads: "
        f"{1e3 * statistics.median(times[OURS]):.0f} ms, {memory:.0f} MiB extra (bar 64)"
    )
    for name in sorted(ratios, key=ratios.__getitem__):
        if name != OURS:
            bar = BARS.get(name)
            verdict = "" if bar is None else f", bar {bar:.2f}: {'pass' if ratios[name] >= bar else 'FAIL'}"
            report.append(f"    {name:30} {1e3 * statistics.median(times[name]):8.0f} ms {ratios[name]:6.2f}x{verdict}")
    benchmark.extra_info.update(
        isa=native.cpu_isa(), torch=torch.__version__, threads=threads, extra_mib=memory, ratios=ratios,
        median_ms={name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
    )  # fmt: skip
