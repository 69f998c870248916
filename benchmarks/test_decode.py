"""Customised generation against the base model alone, against two passes with PEFT, and against PEFT's mixed batch.

    pytest benchmarks/test_decode.py
    pytest benchmarks/test_decode.py -k "batch-1" --benchmark-json decode.json

SmolLM2-135M in bf16 on two cores, LoRA rank 8 on all linear layers that the mode allows, inside transformers' own
generate. Every round lets each competitor generate once, one after the other, in one process; its time per token is the
median over the tokens of the round, a ratio the median over rounds of the two times of one round. No time is taken
before the logits of `separate` agree with two passes of PEFT; that the other modes are right is the tests' business.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

import fastqadapter as fqa
from benchmarks.peers.decode import CACHE_NAME, MixedBatch, generate_in_two_passes
from fastqadapter.demo.smollm import demo_model_folder

ROUNDS, TOKENS, PROMPT, LONG_PROMPT, COMPILED_TOKENS = 7, 24, 80, 1000, 200
MODES = ("shared", "prompt", "separate")
# Times a base token's time, at most; of one adapter's where four are mixed; two passes over ours, at least.
BARS = {("shared", 1): 1.3, ("shared", 8): 1.4, ("separate", 1): 1.6}
FOUR_BAR, TWO_PASS_BAR, FIRST_TOKEN_BAR = 1.6, 2.3, 1.1


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def load() -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # answers as long as asked for
    return model


@functools.cache
def base_model() -> PreTrainedModel:
    return load()


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")


@torch.no_grad()
def draw_adapters(model: PeftModel) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.05, generator=generator)
    return model.eval()


@functools.cache
def qadapter_model(kv_mode: str, adapters: int = 1) -> fqa.QAdapterModel:
    model = fqa.get_qadapter_model(load(), fqa.QAdapterConfig(kv_mode=kv_mode), lora())  # type: ignore[arg-type]
    for number in range(1, adapters):
        model.add_adapter(f"adapter{number}", lora())
    return draw_adapters(model)


@functools.cache
def peft_model() -> PeftModel:
    config = lora()
    config.target_modules = qadapter_model("separate").peft_config["default"].target_modules
    return draw_adapters(get_peft_model(load(), config))


class Clock(LogitsProcessor):
    """When the logits of each token were there."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores

    @property
    def first_token(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def per_token(self) -> float:
        return statistics.median(after - before for before, after in zip(self.times[1:], self.times[2:], strict=False))


Generate = Callable[..., Any]


def run(generate: Generate, ids: Tensor, tokens: int) -> Clock:
    clock = Clock()
    generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        logits_processor=LogitsProcessorList([clock]),
    )  # fmt: skip
    return clock


def mixed_batch(ids: Tensor, **kwargs: Any) -> None:
    """A greedy loop with nothing around it."""
    [clock] = kwargs["logits_processor"]
    stepper, tokens = MixedBatch(peft_model()), ids
    with torch.no_grad():
        for _ in range(kwargs["max_new_tokens"]):
            scores = clock(ids, stepper.step(tokens))
            tokens = scores.argmax(dim=-1, keepdim=True)


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(1000, 40000, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def check_against_two_passes() -> None:
    """`separate` is the same function: what the two differ by in bf16 is little beside what the adapter does."""
    ids, kwargs = prompt(2, PROMPT), {"max_new_tokens": 1, "pad_token_id": 0, "do_sample": False}
    kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        theirs = generate_in_two_passes(peft_model(), ids, **kwargs).scores[0].log_softmax(-1)
        ours = qadapter_model("separate").generate(ids, **kwargs).scores[0].log_softmax(-1)
        base = base_model().generate(ids, **kwargs).scores[0].log_softmax(-1)
    error, effect = (ours - theirs).norm() / theirs.norm(), (base - theirs).norm() / theirs.norm()
    assert error < effect / 4, f"our logits are off by {error:.2%}, the adapter moves them {effect:.2%}"


def interleaved(
    benchmark: Any, competitors: dict[str, Generate], ids: Tensor, tokens: int, rounds: int = ROUNDS, warm_up: int = 2
) -> dict[str, list[Clock]]:
    """The clocks of each competitor, round after round; the first competitor is the one in pytest-benchmark's table."""
    clocks: dict[str, list[Clock]] = {name: [] for name in competitors}
    ours, *others = competitors
    for generate in competitors.values():
        run(generate, ids, warm_up)

    def rest() -> None:
        for name in others:
            clocks[name].append(run(competitors[name], ids, tokens))

    benchmark.pedantic(lambda: clocks[ours].append(run(competitors[ours], ids, tokens)), setup=rest, rounds=rounds)
    return clocks


def ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def verdict(value: float, bar: float | None, at_least: bool = False) -> str:
    if bar is None:
        return f"{value:.2f}"
    passed = value >= bar if at_least else value <= bar
    return f"{value:.2f} (bar {bar}: {'pass' if passed else 'FAIL'})"


@pytest.mark.parametrize("batch", [1, 8], ids="batch-{}".format)
def test_time_per_token(benchmark: Any, batch: int, report: list[str]) -> None:
    competitors: dict[str, Generate] = {kv_mode: qadapter_model(kv_mode).generate for kv_mode in MODES}
    competitors |= {
        "base": base_model().generate,
        "two passes": functools.partial(generate_in_two_passes, peft_model()),
        "PEFT's mixed batch": mixed_batch,
    }
    clocks = interleaved(benchmark, competitors, prompt(batch, PROMPT), TOKENS)
    times = {name: [clock.per_token for clock in each] for name, each in clocks.items()}
    report.append(f"batch {batch}: base {1e3 * statistics.median(times['base']):.1f} ms a token")
    ratios = {name: ratio(each, times["base"]) for name, each in times.items()}
    for name in (*MODES, "two passes", "PEFT's mixed batch"):
        milliseconds = 1e3 * statistics.median(times[name])
        line = f"    {name:20} {milliseconds:6.1f} ms, times base {verdict(ratios[name], BARS.get((name, batch)))}"
        if name in MODES:
            bar = TWO_PASS_BAR if name == "shared" else None
            slower = ratio(times["two passes"], times[name])
            line += f"; two passes take {verdict(slower, bar, at_least=True)} times as long"
        report.append(line)
    benchmark.extra_info.update(torch=torch.__version__, batch=batch, times_base=ratios)


@pytest.mark.parametrize("batch", [1, 8], ids="batch-{}".format)
def test_four_adapters_in_one_call(benchmark: Any, batch: int, report: list[str]) -> None:
    model = qadapter_model("shared", 4)
    mixtures = {"four": dict.fromkeys(model.peft_config, 0.25), "one": {"default": 1.0}}
    competitors = {name: functools.partial(model.generate, adapters=each) for name, each in mixtures.items()}
    clocks = interleaved(benchmark, competitors, prompt(batch, PROMPT), TOKENS)
    times = {name: [clock.per_token for clock in each] for name, each in clocks.items()}
    found = ratio(times["four"], times["one"])
    report.append(f"batch {batch}: four adapters mixed, times one {verdict(found, FOUR_BAR)}")
    benchmark.extra_info.update(torch=torch.__version__, batch=batch, times_one=found)


def test_time_to_first_token(benchmark: Any, report: list[str]) -> None:
    competitors: dict[str, Generate] = {"shared": qadapter_model("shared").generate}
    competitors |= {"prompt": qadapter_model("prompt").generate, "base": base_model().generate}
    clocks = interleaved(benchmark, competitors, prompt(1, LONG_PROMPT), 2)
    times = {name: [clock.first_token for clock in each] for name, each in clocks.items()}
    for name, bar in (("shared", FIRST_TOKEN_BAR), ("prompt", None)):
        found = ratio(times[name], times["base"])
        seconds = statistics.median(times[name])
        report.append(f"first token of {LONG_PROMPT}, {name}: {seconds:.2f} s, times base {verdict(found, bar)}")
        benchmark.extra_info[name] = found


def test_compiled(benchmark: Any, report: list[str]) -> None:
    """Both with a static cache and compiled steps, 200 tokens; a GPU gets CUDA graphs beside."""
    config = CompileConfig(fullgraph=True, mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    competitors: dict[str, Generate] = {
        "shared": functools.partial(qadapter_model("shared").generate, **static),
        "base": functools.partial(base_model().generate, **static),
    }
    competitors |= {
        "shared, as it comes": qadapter_model("shared").generate,
        "base, as it comes": base_model().generate,
    }
    ids = prompt(1, PROMPT)
    run(competitors["shared"], ids, COMPILED_TOKENS)
    graphs = counters["stats"]["unique_graphs"]
    clocks = interleaved(benchmark, competitors, ids, COMPILED_TOKENS, rounds=3, warm_up=COMPILED_TOKENS)
    times = {name: [clock.per_token for clock in each] for name, each in clocks.items()}
    for name in times:
        milliseconds = 1e3 * statistics.median(times[name])
        report.append(f"{name}: {milliseconds:.1f} ms a token, times base {ratio(times[name], times['base']):.2f}")
    report.append(f"graphs compiled for {COMPILED_TOKENS} tokens of shared: {graphs}")
    benchmark.extra_info.update(graphs=graphs, times_base=ratio(times["shared"], times["base"]))


def test_kv_bytes(benchmark: Any, report: list[str]) -> None:
    """Bytes of K/V behind 80 + 24 tokens; timed only so that pytest-benchmark lists it."""

    def kept(model: Any, **kwargs: Any) -> int:
        ids, options = prompt(1, PROMPT), {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        output = model.generate(ids, return_dict_in_generate=True, **options, **kwargs)
        return sum(each.nbytes for layer in output[CACHE_NAME].layers for each in (layer.keys, layer.values))

    model = qadapter_model("shared", 8)
    base = benchmark.pedantic(lambda: kept(base_model()), rounds=1)
    counts = {count: kept(model, adapters=dict.fromkeys(list(model.peft_config)[:count], 0.2)) for count in (1, 2, 8)}
    report.append(f"K/V: base {base} bytes; shared with 1, 2, 8 adapters: {', '.join(map(str, counts.values()))}")
    assert set(counts.values()) == {base}
