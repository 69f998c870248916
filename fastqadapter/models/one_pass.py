"""One forward for all streams: rows [base; adapter 1; adapter 2; ...] of the same tokens.

Weights are read once; each adapter acts on its own rows (`row_lora`), K/V are kept once where the mode shares them
(`cache`), attention reads them once (`stream_attention`). Where a mode needs no Q-value of a token, its rows are the
base's alone: all of the prompt but its last token in `shared` and `prompt` mode. Layers below the first adapted one,
the trunk, run on the base's rows alone in every mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from fastqadapter.models import stream_attention
from fastqadapter.models.attention import attention_of
from fastqadapter.models.cache import CACHE_NAME, StreamCache
from fastqadapter.models.row_lora import StreamRows
from fastqadapter.models.step import Step, check_prompt_end, check_response
from fastqadapter.models.streams import TwoStreams, attributes


class OnePass:
    """Runs the base stream and those of `adapters` on one model, in one pass a step."""

    def __init__(self, streams: TwoStreams, adapters: tuple[str, ...]):
        self.streams = streams
        self.adapters = adapters
        self.rows = StreamRows(adapters)
        trunk = streams.layers[: streams.trunk_depth]
        self.trunk = [TrunkForward(layer, self.rows, layer is trunk[0], layer is trunk[-1]) for layer in trunk]

    def new_cache(self, max_cache_len: int | None = None) -> StreamCache:
        """An empty cache; of fixed size, for compiled decoding, where `max_cache_len` is given."""
        return StreamCache(self.streams.decoder_config, self.streams.kv_mode, max_cache_len)

    def accepted_cache(self, cache: Cache, batch: int) -> StreamCache:
        """`cache` if a call of this model made it, else what goes on from K/V of the base."""
        if isinstance(cache, StreamCache):
            cache.check_usable(self.streams.decoder_config, self.streams.kv_mode, batch)
            return cache
        return StreamCache.from_base(cache, self.streams.decoder_config, self.streams.kv_mode, batch)

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Set the model up for passes; once a call, so that the steps themselves are nothing but a forward."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.streams.lora_layers.on_rows(self.rows))
            stack.enter_context(self.streams.without_checkpointing())
            stack.enter_context(self.streams.running_pass(self.rows))
            for forward in self.trunk:
                stack.enter_context(forward.in_place())
            if self.adapters:  # without, this is the base model, with its own attention
                stack.enter_context(attention_of(self.streams.decoder, stream_attention.NAME))
            yield

    def hidden_states(self, step: Step, cache: StreamCache, rows: int | None) -> Tensor:
        """Last hidden states (S, B, rows, D) of the last `rows` tokens (None: of all) in each stream, base first."""
        kept = step.length if rows is None else min(rows, step.length)
        mode = self.streams.kv_mode
        if mode == "separate" or not self.adapters:
            return self._run(step, cache, self.adapters)[:, :, -kept:]
        if mode == "prompt" and cache.is_forked:
            check_response(step, kept)
        elif mode == "prompt":
            check_prompt_end(step, rows)
        if mode == "shared" and kept == 1 < step.length and step.has_plain_mask and not torch.is_grad_enabled():
            return self._run_with_tail(step, cache)
        if kept < step.length:
            with torch.no_grad():
                self._run(step.but_last(kept), cache, ())
            cache.settle()
        if mode == "prompt" and not cache.is_forked:
            cache.fork(self.adapters)
        return self._run(step.last(kept), cache, self.adapters)

    def _run(self, step: Step, cache: StreamCache, adapters: tuple[str, ...]) -> Tensor:
        """One pass: last hidden states (S, B, L, D)."""
        streams = 1 + len(adapters)
        cache.begin(step.batch, adapters)
        self.rows.streams = streams
        inputs = {**step.repeat(streams).decoder_inputs(), CACHE_NAME: cache}
        if self.adapters:
            inputs["stream_cache"] = cache
        hidden = self.streams.decoder(**inputs, use_cache=True).last_hidden_state
        return hidden.unflatten(0, (streams, step.batch))

    def _run_with_tail(self, step: Step, cache: StreamCache) -> Tensor:
        """One pass of the base over all tokens, with a row more for each adapter at the last one: (S, B, 1, D).

        In `shared` mode such a row reads K/V of the base and writes none, so it can come along with the prompt: the
        first token behind 1000 takes 1.04 of the base's time, and 1.09 to 1.12 where a step for all streams follows
        the prompt (SmolLM2-135M, two Zen 5 cores).
        """
        adapters = len(self.adapters)
        cache.begin(step.batch, self.adapters)
        self.rows.streams, self.rows.tail, self.rows.batch, cache.tail = 1, adapters, step.batch, adapters
        try:
            inputs = {**step.with_tail(adapters).decoder_inputs(), CACHE_NAME: cache, "stream_cache": cache}
            hidden = self.streams.decoder(**inputs, use_cache=True).last_hidden_state
        finally:
            self.rows.tail = cache.tail = 0
        return hidden[:, -1 - adapters :].transpose(0, 1).unsqueeze(2)


class TrunkForward:
    """Forward of a layer of the trunk: the first one drops all rows but the base's, the last one repeats its output for
    every stream."""

    def __init__(self, layer: nn.Module, rows: StreamRows, first: bool, last: bool):
        self.layer = layer
        self.forward: Callable[..., Any] = layer.forward
        self.rows = rows
        self.first = first
        self.last = last

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        """Be the layer's forward inside the context: around the method, or what accelerate's hooks made of it."""
        before: Any = self.layer.forward
        while isinstance(before, TrunkForward):  # of a call that this one is made in, from a callback of `generate`
            before = before.forward
        if self.forward != before:
            self.forward = before
        return attributes([self.layer], forward=self)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        streams = self.rows.streams
        if streams == 1:
            return self.forward(hidden_states, *args, **kwargs)
        batch = hidden_states.shape[0] // streams if self.first else hidden_states.shape[0]

        def narrow(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(narrow, value))
            of_rows = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == streams * batch
            return value[:batch] if of_rows else value

        kwargs = {name: narrow(value) for name, value in kwargs.items()}
        output = self.forward(hidden_states[:batch], *map(narrow, args), **kwargs)
        if not self.last:
            return output
        if isinstance(output, tuple):
            return (output[0].repeat(streams, 1, 1), *output[1:])
        return output.repeat(streams, 1, 1)
