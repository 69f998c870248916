"""Customised generation against the base model alone, two passes with PEFT, and PEFT's mixed batch.

LoRA on all linear layers that the mode allows, in bf16, inside transformers' own generate. Time per token is the median
over the tokens of a round. `decoding.py` has the competitors, and checks their scores before any time is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from transformers import CompileConfig

from fastqadapter_benchmarks import decoding
from fastqadapter_benchmarks.decoding import BASE, base_model, generates, prompt, qadapter_model
from fastqadapter_benchmarks.race import Competitor, Race
from fastqadapter_benchmarks.settings import SETTINGS, Settings
from fastqadapter_benchmarks.workload import title_of

ADAPTERS = (1, 2, 4, 8)
COMPILED_TOKENS = 200


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = metafunc.config.stash[SETTINGS]
    metafunc.parametrize("model", settings.models)
    if "batch" in metafunc.fixturenames:
        names = [f"batch-{batch}-prompt-{length}" for batch, length in settings.decoding]
        metafunc.parametrize(("batch", "length"), settings.decoding, ids=names)


def make_race(benchmark: Any, settings: Settings, suite: str, model: str, what: str, **shape: float) -> Race:
    race = Race(benchmark, settings, suite, f"{title_of(model)}, bf16, {what}", **shape)
    race.facts["baseline"] = BASE
    return race


def test_time_per_token(benchmark: Any, settings: Settings, model: str, batch: int, length: int) -> None:
    decoding.check(settings, model)
    what = f"batch {batch}, prompt {length}"
    race = make_race(benchmark, settings, "decode", model, what, batch=batch, prompt=length)
    ids = prompt(settings, model, batch, length)
    decoding.compete(race, decoding.competitors(settings, model, ids, settings.new_tokens))


@pytest.mark.full
def test_adapters_in_one_call(benchmark: Any, settings: Settings, model: str) -> None:
    """`shared` mode: 1, 2, 4, 8 adapters mixed in one call, on one KV cache."""
    loaded = qadapter_model(settings, model, "shared", max(ADAPTERS))
    mixtures = {count: dict.fromkeys(list(loaded.peft_config)[:count], 1 / count) for count in ADAPTERS}
    for mixture in mixtures.values():
        decoding.check_cache(settings, loaded, model, adapters=mixture)
    ids = prompt(settings, model, 1, 80)
    race = make_race(benchmark, settings, "adapters", model, "batch 1, prompt 80", batch=1, prompt=80)

    def mixed(count: int) -> Callable[[], Any]:
        return generates(loaded, ids, settings.new_tokens, adapters=mixtures[count])

    entrants = [Competitor(f"fastqadapter, shared, adapters: {n}", functools.partial(mixed, n)) for n in ADAPTERS]
    decoding.compete(race, [*entrants, decoding.base_competitor(settings, model, ids, settings.new_tokens)])


@pytest.mark.full
def test_compiled(benchmark: Any, settings: Settings, model: str) -> None:
    """A static cache and compiled steps, 200 tokens; CUDA graphs on a GPU."""
    config = CompileConfig(fullgraph=True, mode="reduce-overhead" if settings.on_gpu else None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    race = make_race(benchmark, settings, "compiled", model, "batch 1, 200 tokens", batch=1, prompt=80)
    race.facts["baseline"] = f"{BASE}, compiled"
    ours, base = qadapter_model(settings, model, "shared"), base_model(settings, model)
    ids, tokens = prompt(settings, model, 1, 80), prompt(settings, model, 1, 83)[:, 80:]
    found, expected = (decoding.step_scores(ours, ids, tokens, **options) for options in (static, {}))
    decoding.assert_agree(found, expected, decoding.step_scores(base, ids, tokens), "compiled")

    entrants = [
        Competitor(f"{label}{kind}", functools.partial(generates, model, ids, COMPILED_TOKENS, **options))
        for kind, options in ((", compiled", static), ("", {}))
        for label, model in (("fastqadapter, shared", ours), (BASE, base))
    ]
    decoding.compete(race, entrants)
