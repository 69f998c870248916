"""The streams one after the other, a cache for each: for models that one pass cannot serve, and to check it by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fastqadapter.models.cache import CACHE_NAME, base_layers, check_batch, repeat_for, sequences_in
from fastqadapter.models.step import Step, check_prompt_end, check_response
from fastqadapter.models.streams import TwoStreams
from fastqadapter.models.two_pass_cache import TwoStreamCache


class TwoPass:
    """Runs the base stream and then those of `adapters` on one model."""

    def __init__(self, streams: TwoStreams, adapters: tuple[str, ...]):
        self.streams = streams
        self.adapters = adapters

    def new_cache(self, max_cache_len: int | None = None) -> TwoStreamCache:
        """An empty cache.

        Raises:
            ValueError: a cache of fixed size is asked for.
        """
        if max_cache_len is not None:
            raise ValueError("this model runs its streams one after the other, without a static cache: leave it out")
        return TwoStreamCache(self.streams.decoder_config)

    def accepted_cache(self, cache: Cache, batch: int) -> TwoStreamCache:
        """`cache` if a call of this model made it, else what goes on from K/V of the base."""
        if isinstance(cache, TwoStreamCache):
            check_batch(sequences_in(cache) or batch, batch)
            return cache
        adopted = TwoStreamCache(self.streams.decoder_config)
        adopted.layers = base_layers(cache, self.streams.decoder_config, self.streams.kv_mode) or adopted.layers
        repeat_for(adopted, batch)
        return adopted

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        with self.streams.without_checkpointing():
            yield

    def hidden_states(self, step: Step, cache: TwoStreamCache, rows: int | None) -> Tensor:
        """Last hidden states (S, B, rows, D) of the last `rows` tokens (None: of all) in each stream, base first."""
        kept = step.length if rows is None else min(rows, step.length)
        own = self.streams.kv_mode != "shared"
        if self.streams.kv_mode == "prompt":
            if self.adapters and not cache.is_forked:
                check_prompt_end(step, rows)
                if kept < step.length:
                    self._run_base(step.but_last(kept), cache)
                for name in self.adapters:
                    cache.fork(name)
                cache.is_forked = True
                step = step.last(kept)
            if self.adapters:
                check_response(step, kept)
        own_caches = {name: cache.own_cache(name) for name in self.adapters} if own else {}
        hidden = [self._run_base(step, cache)[:, -kept:]]
        for name in self.adapters:
            with self.streams.q_stream(name):
                if own:
                    hidden.append(self._run(step, own_caches[name])[:, -kept:])
                else:
                    hidden.append(self._run(step.last(kept), cache.read_only(kept)))
        cache.end_step()
        return torch.stack(hidden)

    def _run_base(self, step: Step, cache: TwoStreamCache) -> Tensor:
        with self.streams.base_stream():
            return self._run(step, cache)

    def _run(self, step: Step, cache: Any) -> Tensor:
        output = self.streams.decoder(**step.decoder_inputs(), **{CACHE_NAME: cache}, use_cache=True)
        return output.last_hidden_state
