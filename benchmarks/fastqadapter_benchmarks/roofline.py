"""Traffic and floor of every op on paper: a prediction, nothing here is measured.

    python -m fastqadapter_benchmarks.roofline
    python -m fastqadapter_benchmarks.roofline --gpu "H200=989,700,4.8,4.3,50,132" --rows 4096

For each op: floating-point operations and bytes that its algorithm cannot do without, the time in which a GPU could do
those at its *measured* rates (the floor), and the time of our implementation by the same rates, with every pass over
memory that it makes, in the tiles and chunks that its rules choose. Rates are inputs: peak bf16 and measured GEMM in
TFLOP/s, peak bandwidth and measured copy in TB/s, the last cache that all multiprocessors share in MiB, their number.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable

import torch

from fastqadapter_kernels.triton.device import Hardware
from fastqadapter_kernels.triton.residual import ENOUGH_TO_DRAW, WHOLE
from fastqadapter_kernels.triton.soft_value import SCRATCH_BYTES, rows_per_chunk
from fastqadapter_kernels.triton.soft_value_lse import LseConfig

BF16, FP32, INDEX = 2, 4, 8


@dataclasses.dataclass(frozen=True)
class Gpu:
    peak_tflops: float
    gemm_tflops: float
    peak_tbytes: float
    copy_tbytes: float
    cache_mib: float
    multiprocessors: float
    arch: str = "sm_90"

    @property
    def hardware(self) -> Hardware:
        return Hardware(self.arch, int(self.multiprocessors), int(self.cache_mib * 2**20))


# Peaks from NVIDIA's data sheets. Measured GEMM rates: A100 208 TFLOP/s in a fused GEMM and log-sum-exp
# (apple/ml-cross-entropy, README), cuBLAS 728 on an H100 (huggingface/trl issue 7244); 745 on an H200 (linkedin/
# Liger-Kernel, SM90 linear cross-entropy). For the A100's cuBLAS 255, four fifths of the peak, is an assumption, as are
# copies at nine tenths of the peak bandwidth (Dao-AILab/quack measured 90 % for a softmax on an H100).
GPUS = {
    "A100": Gpu(312, 255, 2.04, 1.83, 40, 108, "sm_80"),
    "H100": Gpu(989, 700, 3.35, 3.01, 50, 132),
    "H200": Gpu(989, 745, 4.8, 4.3, 50, 132),
}
MODELS = {  # hidden size, vocabulary
    "Llama-3-8B": (4096, 128256),
    "Qwen2.5-7B": (3584, 152064),
    "Gemma-2-2B": (2304, 256000),
    "Qwen2.5-0.5B": (896, 151936),
    "SmolLM2-135M": (576, 49152),
}
ROWS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Passes over memory (bytes), and products (FLOP) with the bytes that stream beside them."""

    flops: float = 0.0
    product_bytes: float = 0.0
    pass_bytes: float = 0.0

    def seconds(self, gpu: Gpu) -> float:
        products = max(self.flops / (gpu.gemm_tflops * 1e12), self.product_bytes / (gpu.copy_tbytes * 1e12))
        return products + self.pass_bytes / (gpu.copy_tbytes * 1e12)


def training(n: int, d: int, v: int, products: int) -> tuple[Cost, Cost]:
    """`soft_value` with gradient: floor and ours. `products`: 3, or 2 with a given lse(b)."""
    flops = 2.0 * n * d * v * products
    streams = products - 1  # of states that are multiplied with W before the expected embedding
    least = v * d * BF16 + streams * n * d * BF16 + n * d * FP32
    chunk = rows_per_chunk(streams * v * BF16, SCRATCH_BYTES)
    chunks = -(-n // chunk)
    scores = n * v * BF16
    product_bytes = 2 * chunks * v * d * BF16 + streams * scores + scores + n * d * FP32
    passes = streams * scores + scores  # the row kernel reads the scores and writes probabilities
    states = 2 * streams * n * d * BF16 + 2 * n * d * FP32  # copied into one matrix; e divided by its sum
    return Cost(flops, least), Cost(flops, product_bytes, passes + states)


def evaluation(gpu: Gpu, n: int, d: int, v: int, products: int) -> tuple[Cost, Cost]:
    """`soft_value` without gradient, 2 products, or 1 with a given lse(b). Ours reads W once for each group of rows."""
    flops = 2.0 * n * d * v * products
    states = products * n * d * BF16
    config = LseConfig.rule(gpu.hardware, torch.bfloat16, n, products == 2, aligned=True)
    row_blocks, tiles = -(-n // config.block_n), -(-v // config.block_v)
    group = config.blocks_in_cache(gpu.hardware, products * d * BF16)
    spans = -(-tiles // config.tiles_per_span(gpu.hardware, n, v))
    padded = row_blocks * config.block_n / n * tiles * config.block_v / v
    partial = 2 * 2 * products * n * FP32 * spans  # maximum and sum, written, then read
    weights = -(-row_blocks // group) * v * d * BF16
    return Cost(flops, v * d * BF16 + states), Cost(flops * padded, weights + states, partial)


def loss_gradient(n: int, d: int, v: int) -> tuple[Cost, Cost]:
    """`g_v e + g_q W[a]`: one row of e and one of W in, one out; ours also sorts the transitions by state."""
    least = n * d * (FP32 + BF16 + FP32) + n * (2 * FP32 + INDEX)
    sorting = 4 * 2 * 2 * n * INDEX  # four passes that read and write keys and places
    return Cost(pass_bytes=least), Cost(pass_bytes=least + sorting + 2 * n * INDEX)


def taken(n: int, d: int, v: int) -> tuple[Cost, Cost]:
    """The state is read in fp32, as the loss gives it."""
    least = n * d * (FP32 + BF16) + n * (INDEX + FP32)
    return Cost(pass_bytes=least), Cost(pass_bytes=least + n * INDEX)


def logit_soft_value(n: int, d: int, v: int) -> tuple[Cost, Cost]:
    least = 2 * n * v * BF16 + n * FP32
    return Cost(pass_bytes=least), Cost(pass_bytes=least + n * FP32)  # the lse of the scores, for the gradient


def logit_soft_value_backward(n: int, d: int, v: int) -> tuple[Cost, Cost]:
    least = 3 * n * v * BF16 + n * FP32
    return Cost(pass_bytes=least), Cost(pass_bytes=least + n * FP32)


def logit_policy(gpu: Gpu, n: int, d: int, v: int, read: int, written: int, again: int) -> tuple[Cost, Cost]:
    """`residual_log_probs` and its gradient: bytes of a score that are read, written, and read again for a row longer
    than WHOLE: from the cache, if that holds the rows of enough multiprocessors to draw the bandwidth."""
    least = n * v * (read + written)
    rows_in_cache = int(gpu.cache_mib * 2**20) * 3 // 4 // (v * again)
    cached = v <= WHOLE or rows_in_cache >= ENOUGH_TO_DRAW * gpu.multiprocessors
    return Cost(pass_bytes=least), Cost(pass_bytes=least + (0 if cached else n * v * again))


OPS: dict[str, Callable[[Gpu, int, int, int], tuple[Cost, Cost]]] = {
    "soft_value, training": lambda gpu, n, d, v: training(n, d, v, 3),
    "soft_value, training, lse(b) given": lambda gpu, n, d, v: training(n, d, v, 2),
    "soft_value, evaluation": lambda gpu, n, d, v: evaluation(gpu, n, d, v, 2),
    "soft_value, evaluation, lse(b) given": lambda gpu, n, d, v: evaluation(gpu, n, d, v, 1),
    "taken_value": lambda gpu, n, d, v: taken(n, d, v),
    "gradient of the hidden states": lambda gpu, n, d, v: loss_gradient(n, d, v),
    "residual_soft_value": lambda gpu, n, d, v: logit_soft_value(n, d, v),
    "residual_soft_value, backward": lambda gpu, n, d, v: logit_soft_value_backward(n, d, v),
    "residual_log_probs": lambda gpu, n, d, v: logit_policy(gpu, n, d, v, 2 * BF16, FP32, 2 * BF16),
    "residual_log_probs, backward": lambda gpu, n, d, v: logit_policy(gpu, n, d, v, 2 * FP32, BF16, FP32),
}


def ratio(op: str, gpu: Gpu, n: int, d: int, v: int) -> float:
    """Predicted time of ours over the floor."""
    floor, ours = OPS[op](gpu, n, d, v)
    return ours.seconds(gpu) / floor.seconds(gpu)


def parse_gpu(text: str) -> tuple[str, Gpu]:
    try:
        name, numbers = text.split("=")
        peak, gemm, peak_bytes, copy, cache, multiprocessors = map(float, numbers.split(","))
        return name, Gpu(peak, gemm, peak_bytes, copy, cache, multiprocessors)  # in the tiles of sm_90
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=peak TFLOP/s,GEMM TFLOP/s,peak TB/s,copy TB/s,cache MiB,multiprocessors, for one "
            "H100=989,700,3.35,3.01,50,132"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="append", type=parse_gpu, help="another GPU, or other rates for one")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="state rows N (default: 512 to 16384)")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    if min(options.rows) < 1:
        parser.error(f"--rows {min(options.rows)}: at least one row is needed")
    gpus = GPUS | dict(options.gpu or [])
    print(
        "PREDICTION from a model of bytes and FLOP; nothing below was measured. bf16, times in ms: floor | ours (ratio)"
    )
    for name, gpu in gpus.items():
        print(
            f"\n{name}: GEMM {gpu.gemm_tflops:g} of {gpu.peak_tflops:g} TFLOP/s, memory {gpu.copy_tbytes:g} of "
            f"{gpu.peak_tbytes:g} TB/s"
        )
        for model in options.model:
            d, v = MODELS[model]
            print(f"  {model} (D = {d}, V = {v})")
            print(f"    {'':38}" + "".join(f"{f'N = {n}':>24}" for n in options.rows))
            for op, costs in OPS.items():
                cells = []
                for n in options.rows:
                    floor, ours = (cost.seconds(gpu) * 1e3 for cost in costs(gpu, n, d, v))
                    cells.append(f"{floor:9.3f} |{ours:7.3f} ({ours / floor:.2f})".rjust(24))
                print(f"    {op:38}" + "".join(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
