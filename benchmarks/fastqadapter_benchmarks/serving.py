"""Tokens per second of the customised policy on vLLM, beside the base alone and vLLM's own LoRA.

    python -m fastqadapter_benchmarks.serving SERVED_FOLDER

The same requests go to each engine, round after round, all in this process. Needs vLLM: see docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from fastqadapter.integrations.vllm.served import Served
from fastqadapter_benchmarks.report import table

OURS, BASE, LORA = "fastqadapter", "base model alone", "vLLM LoRA (adapter applied, not a Q-Adapter)"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="of `fastqadapter export-vllm`")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of each")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--at_least", type=float, help="fail below this ratio to the base's tokens/s over the whole run"
    )
    parser.add_argument("--output", type=Path, help="also write the seconds of every round as JSON")
    arguments = parser.parse_args()
    runs = competitors(arguments)
    seconds: dict[str, dict[str, list[float]]] = {label: {"whole": [], "decoding": []} for label in runs}
    for number in range(1 + arguments.rounds):  # the first warms up
        for label, run in runs.items():
            if label == LORA and number > 1:
                continue  # once: on a CPU its round takes a minute and a half, and is 20 times slower than ours
            whole, first = run(arguments.new_tokens), run(1)
            if number:
                seconds[label]["whole"].append(whole)
                seconds[label]["decoding"].append(whole - first)
    if arguments.output:
        arguments.output.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
    print(report(seconds, arguments.requests, arguments.new_tokens))
    reached = ratio(seconds, OURS, "whole")
    if arguments.at_least and reached < arguments.at_least:
        raise SystemExit(f"{reached:.2f} of the base's tokens/s, not {arguments.at_least}")


def competitors(arguments: argparse.Namespace) -> dict[str, Callable[[int], float]]:
    """Label -> seconds of all requests with so many new tokens each."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    served = Served.read(arguments.folder)
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": arguments.requests}
    settings |= {"enforce_eager": True, "enable_prefix_caching": False}
    ours = LLM(model=str(arguments.folder), **settings)
    base = LLM(model=served.base, **settings)
    with_lora = LLM(model=served.base, enable_lora=True, max_lora_rank=8, **settings)
    lora = LoRARequest("adapter", 1, str(arguments.folder / "adapters" / served.names[0]))
    shape = arguments.requests, arguments.prompt
    ids = torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0)).tolist()
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in ids]

    def timed(engine: LLM, **options: Any) -> Callable[[int], float]:
        def run(tokens: int) -> float:
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            start = time.perf_counter()
            engine.generate(prompts, params, use_tqdm=False, **options)
            return time.perf_counter() - start

        return run

    for label, engine in ((OURS, ours), (BASE, base)):
        print(f"{label}: {engine.llm_engine.vllm_config.cache_config.num_gpu_blocks} KV blocks")
    return {OURS: timed(ours), BASE: timed(base), LORA: timed(with_lora, lora_request=lora)}


def ratio(seconds: dict[str, dict[str, list[float]]], label: str, what: str) -> float:
    """Of tokens/s to the base's, by the median of the rounds that both have run."""
    return statistics.median(base / own for base, own in zip(seconds[BASE][what], seconds[label][what], strict=False))


def report(seconds: dict[str, dict[str, list[float]]], requests: int, tokens: int) -> str:
    """Tokens per second over the whole run and of decoding alone, and their ratios to the base's."""
    rows = []
    for label, own in seconds.items():
        cells = [label]
        for what, count in (("whole", requests * tokens), ("decoding", requests * (tokens - 1))):
            cells += [f"{count / statistics.median(own[what]):.0f}", f"{ratio(seconds, label, what):.2f}"]
        rows.append(cells)
    return table(["", "tokens/s", "of the base's", "decoding alone", "of the base's"], rows)


if __name__ == "__main__":
    main()
