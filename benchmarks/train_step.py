"""One training step, forward and backward of a micro-batch: the published computation against the three KV modes.

    python benchmarks/train_step.py --data hh_harmless_train.jsonl --model demo

Protocol. Round i gives every method the i-th micro-batch of the file, one method after the other, so that a slow moment
of the machine hits all of them; a ratio is the median over rounds of published / method on the same pairs. Memory is
the peak resident set of a step less that of the loaded model, each method in a process of its own. No number is
printed before the losses agree: `separate` with the published objective must give the published loss and gradients.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `benchmarks`, when this file is run as a script

import fastqadapter as fqa
from benchmarks.memory import forget_peak, resident_mib
from benchmarks.step_methods import METHODS, PUBLISHED, Method, Row, disagreement, load_model, pad_rows, prepare_loss
from fastqadapter.data import read_rows, tokenize_row

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARM_UP_ROW = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}
BARS = {"separate": (4.0, 5.0), "shared": (7.0, 10.0)}  # at least so many times faster, smaller


def run_step(model: PeftModel, loss_of: Callable[[], Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    loss_of().backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def measure_times(models: dict[str, PeftModel], batches: Sequence[list[Row]], pad_id: int) -> dict[str, list[float]]:
    """Seconds of every method on every micro-batch, interleaved; the first micro-batch also warms up, uncounted."""
    times: dict[str, list[float]] = {label: [] for label in models}
    with tqdm(total=(1 + len(batches)) * len(METHODS), desc="Timing", unit="step") as bar:
        for round_index, rows in enumerate([batches[0], *batches]):
            for method in METHODS:
                model = models[method.label]
                seconds = run_step(model, prepare_loss(method, model, rows, pad_id))
                if round_index > 0:
                    times[method.label].append(seconds)
                bar.update()
    return times


def measure_own_memory(method: Method, model: PeftModel, batches: Sequence[list[Row]], pad_id: int) -> list[float]:
    """Extra peak MiB of one step on each micro-batch, over this process with its model loaded and used once."""
    run_step(model, prepare_loss(method, model, [WARM_UP_ROW], pad_id))  # lazy imports, thread pools, mapped weights
    forget_peak()
    loaded = resident_mib("VmRSS")
    peaks = []
    for rows in batches:
        forget_peak()
        run_step(model, prepare_loss(method, model, rows, pad_id))
        peaks.append(resident_mib("VmHWM") - loaded)
    return peaks


def measure_memory() -> dict[str, list[float]]:
    """Extra peak MiB of every method, each in a fresh process that runs this script with the same arguments."""
    peaks = {}
    for method in tqdm(METHODS, desc="Memory", unit="method"):
        command = [sys.executable, __file__, *sys.argv[1:], "--measure-memory", method.label]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[method.label] = json.loads(output.splitlines()[-1])
    return peaks


# Report


def median_ratio(published: Sequence[float], method: Sequence[float]) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(published, method, strict=True))


def print_table(times: dict[str, list[float]], peaks: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Print one line a method; returns `label -> (times faster, times smaller)` than published."""
    print(f"\n{'method':32}{'median s':>10}{'quartiles':>16}{'faster':>9}{'extra MiB':>11}{'smaller':>9}")
    ratios = {}
    for label, seconds in times.items():
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        faster = median_ratio(times[PUBLISHED.label], seconds)
        smaller = median_ratio(peaks[PUBLISHED.label], peaks[label])
        ratios[label] = faster, smaller
        spread = f"{low:.2f}-{high:.2f}"
        peak = statistics.median(peaks[label])
        print(f"{label:32}{statistics.median(seconds):10.2f}{spread:>16}{faster:8.1f}x{peak:11.0f}{smaller:8.1f}x")
    return ratios


def print_bars(ratios: dict[str, tuple[float, float]]) -> None:
    for label, bars in BARS.items():
        for what, bar, found in zip(("faster", "smaller"), bars, ratios[label], strict=True):
            print(f"{label}: {found:.1f}x {what}, bar {bar:.0f}x: {'pass' if found >= bar else 'FAIL'}")


def print_batches(batches: Sequence[list[Row]], pad_id: int) -> None:
    for index, rows in enumerate(batches):
        packed = fqa.PreferenceCollator(None, None)(rows)
        counts = f"{pad_rows(rows, pad_id).input_ids.numel()} padded tokens, {packed.input_ids.numel()} packed"
        print(f"micro-batch {index}: {len(rows)} pairs, {counts}, {len(packed.state_rows())} states")


def read_batches(args: argparse.Namespace) -> tuple[list[list[Row]], int]:
    """The first micro-batches of the file, and the pad token."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenized = (tokenize_row(row, tokenizer, max_length=args.max_length) for row in read_rows(args.data))
    rows = list(itertools.islice((row for row in tokenized if row is not None), args.pairs * args.rounds))
    if args.rounds < 2 or len(rows) < args.pairs * args.rounds:
        found = f"{args.data} gave {len(rows)} pairs"
        raise SystemExit(f"{found}: too few for --rounds {args.rounds} (at least 2) of --pairs {args.pairs}")
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return [rows[args.pairs * i : args.pairs * (i + 1)] for i in range(args.rounds)], pad_id


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pairs, in which micro-batches, on which model."""
    parser.add_argument("--data", required=True, help="preference pairs, one JSON object a line")
    parser.add_argument("--model", default="demo", help="folder or hub id; 'demo': the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--max-length", type=int, default=512, help="longest prompt + response in tokens")
    parser.add_argument("--pairs", type=int, default=4, help="pairs in a micro-batch")
    parser.add_argument("--rounds", type=int, default=5, help="micro-batches; every method steps once on each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")


def resolve_model(args: argparse.Namespace) -> None:
    """The folder of the demo's model in place of its name."""
    if args.model == "demo":
        from fastqadapter.demo.smollm import demo_model_folder

        args.model = str(demo_model_folder())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    # How the script calls itself.
    parser.add_argument("--measure-memory", choices=[method.label for method in METHODS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    resolve_model(args)
    return args


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    batches, pad_id = read_batches(args)
    if args.measure_memory:
        method = next(method for method in METHODS if method.label == args.measure_memory)
        model = load_model(method, args.model, DTYPES[args.dtype])
        print(json.dumps(measure_own_memory(method, model, batches, pad_id)))
        return 0
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    environment = f"{cpu}, {args.threads} threads, {args.dtype}, torch {torch.__version__}"
    print(environment)
    print_batches(batches, pad_id)
    dtype = DTYPES[args.dtype]
    reason = disagreement(args.model, dtype, batches[0], pad_id)
    if reason:
        print(f"RED: {reason}; no times are reported", file=sys.stderr)
        return 1
    models = {method.label: load_model(method, args.model, dtype) for method in METHODS}
    times, peaks = measure_times(models, batches, pad_id), measure_memory()
    print_bars(print_table(times, peaks))
    if args.json:
        report = {"environment": environment, "seconds": times, "extra_peak_mib": peaks}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
