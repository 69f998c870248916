"""Generation: the models, the competitors, and the checks that come before any time."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import fastqadapter as fqa
from fastqadapter.config import KVMode
from fastqadapter_benchmarks.peers.decode import CACHE_NAME, MixedBatch, TwoPasses
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import Settings
from fastqadapter_benchmarks.workload import load_base, lora, random_ids, vocab_size

MODES: tuple[KVMode, ...] = ("shared", "prompt", "separate")
BASE, MIXED = "base model alone", "PEFT mixed batch"
TWO_PASSES, TWO_MODELS = "published two passes (PEFT)", "two passes of two models (PEFT)"
# With both at 1 the policy is the adapted model's own, and a check would not see whether the base is in it.
ALPHAS: dict[str, Any] = {"alpha_0": 0.9, "alpha_tilde": 0.7}
CHECKED_STEPS = 3


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


def base_model(settings: Settings, model: str) -> PreTrainedModel:
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
    config = fqa.QAdapterConfig(kv_mode=kv_mode, **ALPHAS)
    wrapped = fqa.get_qadapter_model(base_model(settings, model), config, lora())
    for number in range(1, adapters):
        wrapped.add_adapter(f"adapter{number}", lora())
    return draw_adapters(wrapped)


@functools.lru_cache(maxsize=2)
def peft_model(settings: Settings, model: str) -> PeftModel:
    targets = qadapter_model(settings, model, "separate").peft_config["default"].target_modules
    return draw_adapters(get_peft_model(base_model(settings, model), lora(target_modules=list(targets))))


def passes(settings: Settings, model: str, two_models: bool = False) -> TwoPasses:
    base = base_model(settings, model) if two_models else None
    return TwoPasses(peft_model(settings, model), **ALPHAS, base=base)


# Competitors: each is a call that decodes `tokens` tokens behind the ids


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


def greedy(model: Any, ids: Tensor, tokens: int, processor: LogitsProcessor, **options: Any) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        logits_processor=LogitsProcessorList([processor]), return_dict_in_generate=True, **options,
    )  # fmt: skip


def generates(model: Any, ids: Tensor, tokens: int, **options: Any) -> Callable[[], Decoded]:
    def run() -> Decoded:
        clock = Clock()
        return clock.decoded(kv_bytes(greedy(model, ids, tokens, clock, **options)[CACHE_NAME]))

    return run


def _two_passes(settings: Settings, model: str, ids: Tensor, tokens: int, two_models: bool) -> Callable[[], Decoded]:
    both = passes(settings, model, two_models)

    def run() -> Decoded:
        clock = Clock()
        return clock.decoded(kv_bytes(greedy(both, ids, tokens, clock)[CACHE_NAME], both.kv_cache))

    return run


def _mixed_batch(settings: Settings, model: str, ids: Tensor, tokens: int) -> Callable[[], Decoded]:
    @torch.no_grad()
    def run() -> Decoded:
        clock, stepper, new = Clock(), MixedBatch(peft_model(settings, model), **ALPHAS), ids
        for _ in range(tokens):
            new = clock(ids, stepper.step(new)).argmax(dim=-1, keepdim=True)
        return clock.decoded(kv_bytes(stepper.kv_cache))

    return run


def _ours(settings: Settings, model: str, ids: Tensor, tokens: int, kv_mode: KVMode) -> Callable[[], Decoded]:
    return generates(qadapter_model(settings, model, kv_mode), ids, tokens)


def _base(settings: Settings, model: str, ids: Tensor, tokens: int) -> Callable[[], Decoded]:
    return generates(base_model(settings, model), ids, tokens)


def base_competitor(settings: Settings, model: str, ids: Tensor, tokens: int) -> Competitor:
    return Competitor(BASE, functools.partial(_base, settings, model, ids, tokens), "not customised")


def competitors(settings: Settings, model: str, ids: Tensor, tokens: int) -> list[Competitor]:
    arguments = settings, model, ids, tokens
    return [
        *(Competitor(f"fastqadapter, {mode}", functools.partial(_ours, *arguments, mode)) for mode in MODES),
        base_competitor(*arguments),
        Competitor(TWO_PASSES, functools.partial(_two_passes, *arguments, False), "the adapter switched off and on"),
        Competitor(TWO_MODELS, functools.partial(_two_passes, *arguments, True), "on the same weights"),
        Competitor(MIXED, functools.partial(_mixed_batch, *arguments), "a bare loop"),
    ]


def prompt(settings: Settings, model: str, batch: int, length: int) -> Tensor:
    return random_ids(vocab_size(model), batch, length).to(settings.device)


def compete(race: Race, entrants: list[Competitor]) -> None:
    race.enter(entrants)
    race.facts["kv_bytes"] = {label: decoded.kv_bytes for label, decoded in race.results.items()}
    race.run(lambda decoded: decoded.metrics)


# Checks: the scores of a few steps with the KV cache that is timed, all on the same forced tokens


class Forced(LogitsProcessor):
    """Keeps the log-probabilities of each step and lets the given token follow."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens  # (B, steps)
        self.kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[:, len(self.kept), None]
        self.kept.append(scores.float().log_softmax(dim=-1))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def step_scores(model: Any, ids: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    """(steps, B, V), each step behind its own K/V."""
    forced = Forced(tokens)
    greedy(model, ids, tokens.shape[1], forced, **options)
    return torch.stack(forced.kept)


def scores_from_scratch(model: Any, ids: Tensor, tokens: Tensor, **options: Any) -> Tensor:
    """(steps, B, V), each step a prompt of its own. Equal to `step_scores` in `shared` and `separate` mode."""
    prompts = [torch.cat([ids, tokens[:, :step]], dim=1) for step in range(tokens.shape[1])]
    return torch.cat([step_scores(model, each, tokens[:, :1], **options) for each in prompts])


@torch.no_grad()
def _mixed_batch_scores(settings: Settings, model: str, ids: Tensor, tokens: Tensor) -> Tensor:
    stepper = MixedBatch(peft_model(settings, model), **ALPHAS)
    inputs = [ids, *tokens[:, :-1].split(1, dim=1)]
    return torch.stack([stepper.step(each).float().log_softmax(dim=-1) for each in inputs])


def assert_agree(found: Tensor, expected: Tensor, base: Tensor, what: str) -> None:
    """What the two differ by in bf16 is little beside what the adapter does."""
    error, effect = ((each - expected).norm() / expected.norm() for each in (found, base))
    assert error < effect / 4, f"{what}: the scores are off by {error:.1%}, the adapter moves them by {effect:.1%}"


@functools.cache
def check(settings: Settings, model: str) -> None:
    """`separate` and the mixed batch are two passes with PEFT, `shared` what it is without a cache.

    `prompt` is another function when a step becomes a part of the prompt: it is the tests' business.
    """
    ids, tokens = prompt(settings, model, 2, 40), prompt(settings, model, 2, 40 + CHECKED_STEPS)[:, 40:]
    base = step_scores(base_model(settings, model), ids, tokens)
    expected = step_scores(passes(settings, model), ids, tokens)
    assert_agree(step_scores(qadapter_model(settings, model, "separate"), ids, tokens), expected, base, "separate")
    both = step_scores(passes(settings, model, two_models=True), ids, tokens)
    assert_agree(both, expected, base, TWO_MODELS)
    assert_agree(_mixed_batch_scores(settings, model, ids, tokens), expected, base, MIXED)
    check_cache(settings, qadapter_model(settings, model, "shared"), model)


def check_cache(settings: Settings, wrapped: fqa.QAdapterModel, model: str, **options: Any) -> None:
    """Steps on a cache have the scores of a fresh prompt."""
    ids, tokens = prompt(settings, model, 2, 40), prompt(settings, model, 2, 40 + CHECKED_STEPS)[:, 40:]
    base = step_scores(base_model(settings, model), ids, tokens)
    fresh = scores_from_scratch(wrapped, ids, tokens, **options)
    assert_agree(step_scores(wrapped, ids, tokens, **options), fresh, base, "shared")
