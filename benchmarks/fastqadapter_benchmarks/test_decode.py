"""Customised generation against the base model alone, two passes with PEFT, and PEFT's mixed batch.

LoRA on all linear layers that the mode allows, in bf16, inside transformers' own generate. Time per token is the median
over the tokens of a round. No time is taken before the logits of `separate` agree with two passes of PEFT; that the
other modes are right is the tests' business.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

import fastqadapter as fqa
from fastqadapter.config import KVMode
from fastqadapter_benchmarks.peers.decode import CACHE_NAME, MixedBatch, TwoPasses
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import SETTINGS, Settings
from fastqadapter_benchmarks.workload import load_base, lora, random_ids, title_of

MODES: tuple[KVMode, ...] = ("shared", "prompt", "separate")
BASE, TWO_PASSES, MIXED = "base model alone", "published two passes (PEFT)", "PEFT mixed batch"
ADAPTERS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one call of generate took."""

    first_token: float
    per_token: float
    kv_bytes: int

    @property
    def metrics(self) -> dict[str, float]:
        return {"per_token": self.per_token, "first_token": self.first_token}


class Clock(LogitsProcessor):
    """When the logits of each token were there."""

    def __init__(self) -> None:
        self.times = [self.now()]

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(self.now())
        return scores

    def decoded(self, kv_bytes: int) -> Decoded:
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return Decoded(steps[0], statistics.median(steps[1:]), kv_bytes)


# Models: one of each kind for all cases, all on the same base weights


def _base(settings: Settings, model: str) -> PreTrainedModel:
    base = load_base(model, settings.device)
    base.generation_config.eos_token_id = None  # answers as long as asked for
    return base


@torch.no_grad()
def draw_adapters(model: PeftModel) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@functools.lru_cache(maxsize=8)
def qadapter_model(settings: Settings, model: str, kv_mode: KVMode, adapters: int = 1) -> fqa.QAdapterModel:
    wrapped = fqa.get_qadapter_model(_base(settings, model), fqa.QAdapterConfig(kv_mode=kv_mode), lora())
    for number in range(1, adapters):
        wrapped.add_adapter(f"adapter{number}", lora())
    return draw_adapters(wrapped)


@functools.lru_cache(maxsize=2)
def peft_model(settings: Settings, model: str) -> PeftModel:
    targets = qadapter_model(settings, model, "separate").peft_config["default"].target_modules
    return draw_adapters(get_peft_model(_base(settings, model), lora(target_modules=list(targets))))


def kv_bytes(*caches: Any) -> int:
    """Bytes of K/V in caches of any kind."""
    tensors = [
        each
        for cache in caches
        for layer in cache.layers
        for each in (layer.keys, layer.values, *(getattr(layer, "prefix", None) or ()))
        if each is not None
    ]
    return sum(each.nbytes for each in tensors)


# Competitors: each is a call that decodes `tokens` tokens behind the ids


def generates(model: Any, ids: Tensor, tokens: int, **options: Any) -> Callable[[], Decoded]:
    def run() -> Decoded:
        clock = Clock()
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            logits_processor=LogitsProcessorList([clock]), return_dict_in_generate=True, **options,
        )  # fmt: skip
        return clock.decoded(kv_bytes(output[CACHE_NAME]))

    return run


def two_passes(model: PeftModel, ids: Tensor, tokens: int) -> Callable[[], Decoded]:
    def run() -> Decoded:
        clock, passes = Clock(), TwoPasses(model)
        output = passes.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            logits_processor=[clock], return_dict_in_generate=True,
        )  # fmt: skip
        return clock.decoded(kv_bytes(output[CACHE_NAME], passes.kv_cache))

    return run


def mixed_batch(model: PeftModel, ids: Tensor, tokens: int) -> Callable[[], Decoded]:
    """A greedy loop with nothing around it."""

    @torch.no_grad()
    def run() -> Decoded:
        clock, stepper, new = Clock(), MixedBatch(model), ids
        for _ in range(tokens):
            new = clock(ids, stepper.step(new)).argmax(dim=-1, keepdim=True)
        return clock.decoded(kv_bytes(stepper.kv_cache))

    return run


def ours(settings: Settings, model: str, ids: Tensor, tokens: int, kv_mode: KVMode) -> Callable[[], Decoded]:
    return generates(qadapter_model(settings, model, kv_mode), ids, tokens)


def competitors(settings: Settings, model: str, ids: Tensor, tokens: int) -> list[Competitor]:
    def made(build: Callable[..., Callable[[], Decoded]], of: Callable[[], Any]) -> Callable[[], Callable[[], Decoded]]:
        return lambda: build(of(), ids, tokens)

    streams = [
        Competitor(f"fastqadapter, {mode}", functools.partial(ours, settings, model, ids, tokens, mode))
        for mode in MODES
    ]
    return [
        *streams,
        Competitor(BASE, made(generates, lambda: _base(settings, model)), "not customised"),
        Competitor(TWO_PASSES, made(two_passes, lambda: peft_model(settings, model))),
        Competitor(MIXED, made(mixed_batch, lambda: peft_model(settings, model)), "a bare loop"),
    ]


def prompt(settings: Settings, model: str, batch: int, length: int) -> Tensor:
    return random_ids(model, batch, length).to(settings.device)


@torch.no_grad()
def check_against_two_passes(settings: Settings, model: str) -> None:
    """`separate` is the same function: what the two differ by in bf16 is little beside what the adapter does."""
    ids = prompt(settings, model, 2, 40)
    kwargs: dict[str, Any] = {"max_new_tokens": 1, "pad_token_id": 0, "do_sample": False}
    kwargs |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_scores": True}
    theirs, ours, base = (
        each.generate(ids, **kwargs).scores[0].log_softmax(-1)
        for each in (
            TwoPasses(peft_model(settings, model)), qadapter_model(settings, model, "separate"), _base(settings, model)
        )
    )  # fmt: skip
    error, effect = (ours - theirs).norm() / theirs.norm(), (base - theirs).norm() / theirs.norm()
    assert error < effect / 4, f"our logits are off by {error:.2%}, the adapter moves them {effect:.2%}"


def compete(race: Race, entrants: list[Competitor]) -> None:
    race.enter(entrants)
    race.facts["kv_bytes"] = {label: decoded.kv_bytes for label, decoded in race.results.items()}
    race.run(lambda decoded: decoded.metrics)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash[SETTINGS]
    metafunc.parametrize("model", settings.models)
    if "batch" in metafunc.fixturenames:
        names = [f"batch-{batch}-prompt-{length}" for batch, length in settings.decoding]
        metafunc.parametrize(("batch", "length"), settings.decoding, ids=names)


def test_time_per_token(benchmark: Any, settings: Settings, model: str, batch: int, length: int) -> None:
    check_against_two_passes(settings, model)
    title = f"{title_of(model)}, bf16, batch {batch}, prompt {length}"
    race = Race(benchmark, settings, "decode", title, batch=batch, prompt=length)
    race.facts["baseline"] = BASE
    compete(race, competitors(settings, model, prompt(settings, model, batch, length), settings.new_tokens))


@pytest.mark.full
def test_adapters_in_one_call(benchmark: Any, settings: Settings, model: str) -> None:
    """`shared` mode: 1, 2, 4, 8 adapters mixed in one call, on one KV cache."""
    ids = prompt(settings, model, 1, 80)
    race = Race(benchmark, settings, "adapters", f"{title_of(model)}, bf16, batch 1, prompt 80", batch=1, prompt=80)
    race.facts["baseline"] = BASE
    loaded = qadapter_model(settings, model, "shared", max(ADAPTERS))

    def mixed(count: int) -> Callable[[], Callable[[], Decoded]]:
        mixture = dict.fromkeys(list(loaded.peft_config)[:count], 1 / count)
        return lambda: generates(loaded, ids, settings.new_tokens, adapters=mixture)

    base = Competitor(BASE, lambda: generates(_base(settings, model), ids, settings.new_tokens), "not customised")
    compete(race, [*(Competitor(f"fastqadapter, shared, adapters: {n}", mixed(n)) for n in ADAPTERS), base])


@pytest.mark.full
def test_compiled(benchmark: Any, settings: Settings, model: str) -> None:
    """A static cache and compiled steps, 200 tokens; CUDA graphs on a GPU."""
    config = CompileConfig(fullgraph=True, mode="reduce-overhead" if settings.on_gpu else None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    ids = prompt(settings, model, 1, 80)
    race = Race(benchmark, settings, "compiled", f"{title_of(model)}, bf16, batch 1, 200 tokens", batch=1, prompt=80)
    race.facts["baseline"] = f"{BASE}, compiled"
    models: dict[str, Callable[[], Any]] = {
        "fastqadapter, shared": functools.partial(qadapter_model, settings, model, "shared"),
        BASE: functools.partial(_base, settings, model),
    }

    def decoding(of: Callable[[], Any], options: dict[str, Any]) -> Callable[[], Callable[[], Decoded]]:
        return lambda: generates(of(), ids, 200, **options)

    kinds: dict[str, dict[str, Any]] = {", compiled": static, "": {}}
    compete(
        race,
        [
            Competitor(label + kind, decoding(of, options))
            for kind, options in kinds.items()
            for label, of in models.items()
        ],
    )
