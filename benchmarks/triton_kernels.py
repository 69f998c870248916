"""The Triton kernels against bare GEMMs of the same size, on a GPU.

    python benchmarks/triton_kernels.py
    python benchmarks/triton_kernels.py --model Llama-3-8B --rows 4096 --dtype bf16

Times are medians of `triton.testing.do_bench`. All entries of a line are measured in turn, for three rounds, of which
the median counts, so that a slow moment hits all. No time is printed before the results agree with eager in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `benchmarks`, when this file is run as a script

from benchmarks.roofline import MODELS
from fastqadapter import ops
from fastqadapter.testing import assert_close_to_truth

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALPHAS = {"alpha_0": 0.9, "alpha_tilde": 0.7}
ROUNDS = 3
Measure = Callable[[Callable[[], Any]], float]  # -> ms


@dataclasses.dataclass(frozen=True)
class Case:
    """One size, with its tensors."""

    hidden_q: Tensor  # (N, D)
    hidden_b: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    logits: tuple[Tensor, Tensor]  # (rows, V) each, for the logit-level ops

    @staticmethod
    def make(rows: int, size: int, vocab: int, dtype: torch.dtype, device: str) -> Case:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        weight = (normal(vocab, size).float() * 2 / size**0.5).to(dtype)
        few = min(rows, 1024)
        return Case(0.1 * normal(rows, size), normal(rows, size), weight, (normal(few, vocab), normal(few, vocab)))


def soft_value(case: Case, backend: str, *, train: bool) -> Callable[[], Any]:
    hidden_q = case.hidden_q.detach().requires_grad_(train)

    def run() -> Any:
        value = ops.soft_value(hidden_q, case.hidden_b, case.weight, **ALPHAS, backend=backend)
        return torch.autograd.grad(value.sum(), hidden_q) if train else value

    return run


def logit_op(op: Callable[..., Tensor], case: Case, backend: str) -> Callable[[], Any]:
    q, b = case.logits
    q = q.detach().requires_grad_()
    upstream: list[Tensor] = []

    def run() -> Any:
        result = op(q, b, **ALPHAS, backend=backend)
        if not upstream:
            upstream.append(torch.ones_like(result))
        return torch.autograd.grad(result, q, upstream)

    return run


def bare_products(case: Case, count: int) -> Callable[[], None]:
    """`count` GEMMs of size N*D*V; in chunks of 512 rows, since all the scores at once would not fit."""
    scores = case.weight.new_empty((min(512, len(case.hidden_q)), case.weight.shape[0]))
    out = torch.empty_like(case.hidden_q[: len(scores)])

    def run() -> None:
        for chunk in case.hidden_q.split(512):
            for _ in range(count if count < 3 else 2):
                torch.mm(chunk, case.weight.T, out=scores[: len(chunk)])
            if count == 3:
                torch.mm(scores[: len(chunk)], case.weight, out=out[: len(chunk)])

    return run


def lines(case: Case) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is measured: label -> competitor -> call; the first competitor is the one that others are compared with."""
    table = {
        "soft_value, training": {
            "3 bare GEMMs": bare_products(case, 3),
            **{name: soft_value(case, name, train=True) for name in ("triton", "torch")},
        },
        "soft_value, evaluation": {
            "2 bare GEMMs": bare_products(case, 2),
            **{name: soft_value(case, name, train=False) for name in ("triton", "torch")},
        },
    }
    for op in (ops.residual_soft_value, ops.residual_log_probs):
        copies = [logits.clone() for logits in case.logits]
        table[f"{op.__name__}, {len(copies[0])} rows"] = {
            "copy of both logits": lambda copies=copies: [x.copy_(y) for x, y in zip(copies, case.logits, strict=True)],
            **{name: logit_op(op, case, name) for name in ("triton", "torch", "eager")},
        }
    return table


def check(case: Case) -> None:
    """The kernels agree with eager in float64 on some rows, or an AssertionError says where not."""
    rows = slice(0, 16)

    def run(backend: str, to: torch.dtype) -> list[Tensor]:
        hidden_q = case.hidden_q[rows].to(to).requires_grad_()
        args = (hidden_q, case.hidden_b[rows].to(to), case.weight.to(to))
        value = ops.soft_value(*args, **ALPHAS, backend=backend)
        return [value.detach(), *torch.autograd.grad(value.sum(), hidden_q)]

    dtype = case.weight.dtype
    for three in zip(run("triton", dtype), run("eager", dtype), run("eager", torch.float64), strict=True):
        assert_close_to_truth(*three, name="soft_value", dtype=dtype)


def times(competitors: dict[str, Callable[[], Any]], measure: Measure) -> dict[str, float]:
    """Median ms of each, measured in turn."""
    rounds = [{name: measure(run) for name, run in competitors.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(one[name] for one in rounds) for name in competitors}


def report(case: Case, measure: Measure) -> list[str]:
    """One line of text for each line of the table."""
    check(case)
    text = []
    for label, competitors in lines(case).items():
        found = times(competitors, measure)
        (_, least), *_ = found.items()
        cells = [f"{name} {ms:.3f} ms ({ms / least:.2f}x)" for name, ms in found.items()]
        text.append(f"  {label:36} {', '.join(cells)}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this measures a CUDA or ROCm GPU, and torch finds none here", file=sys.stderr)
        return 1
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for model in options.model:
        for rows in options.rows:
            for dtype in options.dtype:
                print(f"{model}, N = {rows}, {dtype}", flush=True)
                case = Case.make(rows, *MODELS[model], DTYPES[dtype], "cuda")
                print(*report(case, lambda run: triton.testing.do_bench(run, return_mode="median")), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
