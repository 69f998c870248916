"""Compile every kernel, in every configuration that its rule can choose, for GPUs that need not be here.

    python tools/compile_kernels.py                            check all, print what is wrong
    python tools/compile_kernels.py --write docs/kernels.md    and write the tables there

Fails on a compile error, a spill or stack, shared memory beyond the device, a 16-bit matrix kernel without its chip's
tensor-core instruction, and a row kernel with loads of less than 16 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from fastqadapter_kernels.triton import preference_loss, residual, soft_value, soft_value_lse, taken_value
from kernel_compiler import GPUS, LAUNCHER_MODULES, Launch, Report, compile_launch, recorded_launches

LAUNCHER_MODULES[:] = [preference_loss, residual, soft_value, soft_value_lse, taken_value]
# Rows, hidden size, vocabulary. More models would add nothing: the code depends on sizes through the rules alone.
SHAPES = {
    "Llama-3-8B": (4096, 4096, 128256),
    "Llama-2-7B": (4096, 4096, 32000),
    "V = 16384": (64, 1024, 16384),
    "V = 3000": (64, 1000, 3000),  # rows of D start at 16 bytes, but not at 16 numbers
    "SmolLM2-135M, N = 33": (33, 576, 49152),
}
EVERY_HEAD = "Llama-3-8B"
RAGGED = "ragged"
RAGGED_SHAPE = (1, 123, 507)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSOR_CORES = ["HMMA", "HGMMA", "UTCHMMA", "v_mfma"]
MARKER = "<!-- tables by tools/compile_kernels.py -->"
MATRIX = {"soft_value_lse"}
NARROW = {"LDG.64", "LDG.32", "LDG.16", "load.64", "load.32", "load.16"}
# Loads of single numbers (an action, a lse), which are no vectors, in kernels whose other loads must be 16 bytes wide.
# The loop over the transitions of a state is unrolled four times. On AMD's GPUs most are scalar instructions.
SCALAR_LOADS = {
    "probabilities": 1,
    "residual_soft_value": 0,
    "residual_soft_value_bwd": 2,
    "residual_log_probs": 0,
    "residual_log_probs_bwd": 0,
    "taken_value": 2,
    "hidden_gradient": 27,
}
SCALAR_LOADS_AMD = {**dict.fromkeys(SCALAR_LOADS, 0), "probabilities": 1}


def launchers(rows: int, size: int, vocab: int, dtype: torch.dtype, every_head: bool) -> Iterator[Callable[[], Any]]:
    """Calls of every launcher; with every combination of the head's options, or with none and with all of them."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, weight, bias, lse = meta(rows, size), meta(vocab, size), meta(vocab), meta(rows, dtype=torch.float32)
    heads = [
        (None, None, None), (30.0, None, None), (None, bias, None), (None, bias, bias), (30.0, bias, bias),
        (None, meta(vocab, dtype=torch.float32), None),
    ]  # fmt: skip
    for softcap, bias_b, bias_q in heads if every_head else (heads[0], heads[4]):
        for known in (None, lse):
            args = (hidden, hidden, weight, bias_b, bias_q, known, 0.7, 1.3, 0.9, softcap, False)
            yield lambda args=args: soft_value_lse.soft_value_lse(*args)
            yield lambda args=args: soft_value.soft_value_and_gradient(*args)

    transposed = meta(size, vocab).T
    yield lambda: soft_value_lse.soft_value_lse(hidden, hidden, transposed, *[None] * 3, 0.7, 1.3, 0.9, None, False)

    logits, grad = meta(rows, vocab), meta(rows, vocab, dtype=torch.float32)
    yield lambda: residual.residual_soft_value(logits, logits, 0.7, 1.3)
    yield lambda: residual.residual_soft_value_bwd(logits, logits, lse, lse, 0.7, 1.3)
    yield lambda: residual.residual_log_probs(logits, logits, 0.7, 1.3)
    yield lambda: residual.residual_log_probs_bwd(grad, grad, 1.3, dtype)

    narrow, index = meta(rows, dtype=torch.int32), meta(rows, dtype=torch.int64)
    yield lambda: taken_value.taken_value(hidden, weight, narrow, narrow)
    ends = meta(rows + 1, dtype=torch.int64)
    for states in (None, index):
        for source in (hidden, meta(rows, size, dtype=torch.float32)):
            yield lambda states=states, source=source: taken_value.taken_value(source, weight, index, states)
    expected = meta(rows, size, dtype=torch.float32)
    for value in ((lse, expected), (None, None)):
        for out in (dtype, torch.float32):
            args = (*value, lse, weight, index, index, ends, out)
            yield lambda args=args: taken_value.hidden_gradient(*args)
    args = (lse, lse, index, meta(2 * rows + 1, dtype=torch.int64), lse, lse, 1.0, 0.1)
    yield lambda: preference_loss.preference_loss(*args)


@dataclasses.dataclass(frozen=True)
class Job:
    gpu: str
    dtype: str
    shape: str  # the first of SHAPES that needs this launch
    launch: Launch

    @property
    def wide(self) -> bool:
        """Whether rows start at multiples of 16 numbers, so that all their loads can be wide."""
        return self.shape not in (RAGGED, "V = 3000")

    @property
    def configuration(self) -> str:
        blocks = [str(value) for name, value in self.launch.constants if name.startswith("BLOCK_")]
        flags = [name.lower() for name, value in self.launch.constants if value is True and name != "UPCAST"]
        options = dict(self.launch.options)
        stages = f", {options['num_stages']} stages" if "num_stages" in options else ""
        return f"{'x'.join(blocks)}, {options['num_warps']} warps{stages} {' '.join(flags)}".strip()


def jobs(gpus: list[str]) -> list[Job]:
    """Every distinct launch, each with the first shape that needs it."""
    found: dict[tuple[str, str, Launch], Job] = {}
    for gpu in gpus:
        for dtype_name, dtype in DTYPES.items():
            for shape_name, shape in {**SHAPES, RAGGED: RAGGED_SHAPE}.items():
                with recorded_launches(GPUS[gpu]) as launches:
                    for launch in launchers(*shape, dtype, every_head=shape_name == EVERY_HEAD):
                        launch()
                for launch in launches:
                    found.setdefault((gpu, dtype_name, launch), Job(gpu, dtype_name, shape_name, launch))
    return list(found.values())


def problems(job: Job, report: Report) -> Iterator[str]:
    """What must not be in the machine code."""
    gpu, name = GPUS[job.gpu], job.launch.name
    if report.spills:
        yield f"spills or stack ({report.spills})"
    if report.shared > gpu.shared_per_block:
        yield f"{report.shared} bytes of shared memory, the device has {gpu.shared_per_block}"
    if not report.blocks:
        yield "no block fits on a multiprocessor"
    cores = [gpu.tensor_core] if job.dtype != "fp32" else TENSOR_CORES
    if name in MATRIX and not any(report.instructions.get(core) for core in cores):
        yield f"no {' or '.join(cores)}"
    if name in MATRIX and dict(job.launch.constants)["PRECISION"] not in ("ieee", "tf32x3"):
        yield "plain TF32 products"
    narrow = sum(count for kind, count in report.instructions.items() if kind in NARROW)
    expected = (SCALAR_LOADS if gpu.target.backend == "cuda" else SCALAR_LOADS_AMD).get(name, narrow)
    if job.wide and narrow > expected:
        yield f"{narrow} loads of less than 16 bytes, {expected} expected"


def check(job: Job) -> tuple[Report | None, list[str]]:
    try:
        report = compile_launch(job.launch, GPUS[job.gpu])
    except Exception as error:  # whatever stage of the compiler it comes from
        return None, [f"does not compile: {str(error).strip().splitlines()[-1]}"]
    return report, list(problems(job, report))


def check_numbered(number: int) -> tuple[Report | None, list[str]]:
    return check(JOBS[number])


JOBS: list[Job] = []  # kernels cannot be pickled, so workers are forked from this process and given numbers


def tables(checked: list[tuple[Job, Report]]) -> str:
    """Markdown: one row for each kernel, dtype and configuration of real shapes; of its variants the largest needs."""
    lines = [f"Triton {triton.__version__}, fp16 as bf16."]
    for gpu_name, gpu in GPUS.items():
        rows: dict[tuple[str, str, str], Report] = {}
        for job, report in checked:
            if job.gpu == gpu_name and job.dtype != "fp16" and job.shape != RAGGED:
                key = (job.launch.name, job.dtype, job.configuration)
                rows[key] = max(rows.get(key, report), report, key=lambda report: report.registers)
        if rows:
            unit = "multiprocessor" if gpu.target.backend == "cuda" else "compute unit"
            lines += ["", f"### {gpu_name} ({gpu.name})", ""]
            lines += [f"| kernel | dtype | configuration | registers | shared | blocks a {unit} | instructions |"]
            lines += ["| --- | --- | --- | ---: | ---: | ---: | --- |"]
        for (kernel, dtype, configuration), report in rows.items():
            found = ", ".join(f"{count} {name}" for name, count in report.instructions.items())
            lines += [
                f"| {kernel} | {dtype} | {configuration} | {report.registers} | {report.shared} | {report.blocks} "
                f"| {found} |"
            ]
    return "\n".join(lines) + "\n"


def write_tables(path: Path, text: str) -> None:
    """Replace what follows the marker in the page."""
    before = path.read_text(encoding="utf-8").split(MARKER)[0]
    path.write_text(f"{before}{MARKER}\n\n{text}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS), help="default: all of them")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced, e.g. docs/kernels.md")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args()
    if options.write and MARKER not in options.write.read_text(encoding="utf-8"):
        parser.error(f"{options.write} has no line {MARKER!r} after which the tables could stand")

    JOBS.extend(jobs(options.gpus))
    checked, failures = [], 0
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        results = tqdm(pool.imap(check_numbered, range(len(JOBS))), total=len(JOBS), unit=" kernels", disable=None)
        for job, (report, wrong) in zip(JOBS, results, strict=True):
            for problem in wrong:
                failures += 1
                tqdm.write(f"{job.gpu} {job.dtype} {job.shape}: {job.launch.name} {job.configuration}: {problem}")
            if report is not None:
                checked.append((job, report))
    print(f"{len(JOBS)} kernels compiled for {', '.join(options.gpus)}: {failures} problems")
    if options.write:
        write_tables(options.write, tables(checked))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
