"""What the native CPU kernels give a whole training step: predicted from the share of the LM head, and measured.

    python benchmarks/head_share.py --data PAIRS.jsonl

Round i takes the i-th micro-batch of the file through one step, forward and backward, with the backend `torch` and with
`cpu` in turn; then through what the head does of it, the loss from hidden states and its gradient, in turn again. The
step is predicted to become shorter by what the head does. No time is printed before the losses of both agree.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `benchmarks`, when this file is run as a script

import fastqadapter as fqa
from benchmarks.train_step import DTYPES, add_data_arguments, read_batches, resolve_model
from fastqadapter.loss import q_adapter_loss
from fastqadapter.models.base import lm_head_of
from fastqadapter.ops.backends import ENVIRONMENT_VARIABLE
from fastqadapter.packing import PackedPairs
from fastqadapter_kernels import native

BACKENDS = ("torch", "cpu")


def seconds(run: Callable[[], Tensor], backend: str) -> tuple[float, float]:
    """Seconds of a forward and backward pass, and its loss."""
    with mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: backend}):
        start = time.perf_counter()
        loss = run()
        loss.backward()
        return time.perf_counter() - start, loss.item()


def head_of(model: fqa.QAdapterModel, batch: PackedPairs) -> Callable[[], Tensor]:
    """The loss of a batch from its hidden states, which are computed once."""
    with torch.no_grad():
        hidden_q, hidden_b = model.hidden_states(batch)
    hidden_q.requires_grad_()
    head = lm_head_of(model.get_base_model())
    return lambda: q_adapter_loss(hidden_q, hidden_b, head, batch, model.qadapter_config)[0]


def measure(model: fqa.QAdapterModel, batches: list[PackedPairs]) -> dict[tuple[str, str], list[float]]:
    """Seconds by (step or head, backend), one for each micro-batch; the first also warms up, uncounted."""
    times: dict[tuple[str, str], list[float]] = {}
    for index, batch in enumerate(tqdm([batches[0], *batches], desc="Timing", unit="micro-batch")):
        for what, run in (("step", lambda batch=batch: model(batch).loss), ("head", head_of(model, batch))):
            losses = {}
            for backend in BACKENDS:
                taken, losses[backend] = seconds(run, backend)
                model.zero_grad(set_to_none=True)
                if index > 0:
                    times.setdefault((what, backend), []).append(taken)
            difference = abs(losses["cpu"] / losses["torch"] - 1)
            if not difference <= 0.01:
                raise SystemExit(
                    f"RED: micro-batch {index}: the losses differ by {difference:.1%}; no times are reported"
                )
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    args = parser.parse_args()
    if native.native_library() is None:
        raise SystemExit("there is no native library here: see `fastqadapter env`")
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    resolve_model(args)
    rows, _ = read_batches(args)
    batches = [fqa.PreferenceCollator(None, None)(each) for each in rows]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    lora = LoraConfig(r=8, init_lora_weights=False, task_type="CAUSAL_LM")
    model = fqa.get_qadapter_model(base, fqa.QAdapterConfig(kv_mode="shared"), lora).train()

    times = measure(model, batches)
    median = {key: statistics.median(found) for key, found in times.items()}
    print(f"kernels {native.cpu_isa()}, {args.threads} threads, {args.dtype}, torch {torch.__version__}; medians in ms")
    for what in ("head", "step"):
        theirs, ours = (1e3 * median[what, backend] for backend in BACKENDS)
        ratio = statistics.median(a / b for a, b in zip(times[what, "torch"], times[what, "cpu"], strict=True))
        print(f"  {what}: torch {theirs:.0f}, cpu {ours:.0f}, {ratio:.2f} times faster")
    steps = zip(*(times[key] for key in (("step", "torch"), ("head", "torch"), ("head", "cpu"))), strict=True)
    predicted = [step / (step - theirs + ours) for step, theirs, ours in steps]
    print(f"  step, predicted from the head: {statistics.median(predicted):.2f} times faster")
    return 0


if __name__ == "__main__":
    sys.exit(main())
