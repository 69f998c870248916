"""The KV cache of one pass over several streams: B sequences, the base stream's rows first.

| mode | K/V rows |
| --- | --- |
| `shared` | B: the base's, which all streams read |
| `separate` | S * B: each stream its own; B in the trunk, where all streams are one |
| `prompt` | B for the prompt but its last token, S * B behind it |

The layers are transformers' own, dynamic, static or sliding, so beams, crops and offsets are theirs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastqadapter.config import KVMode

# What transformers calls the KV cache in forwards, outputs and generate: "past_key_values" before 5.24, then "cache".
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class StreamCache(Cache):
    """K/V of B sequences in several streams.

    Args:
        config: of the decoder.
        kv_mode: which rows are kept, see above.
        max_cache_len: tokens to allocate from the start, for compiled decoding; None: the cache grows.
        layers: K/V of the base stream to start from; see `from_base`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        kv_mode: KVMode,
        max_cache_len: int | None = None,
        layers: list[CacheLayerMixin] | None = None,
    ):
        self.config = config
        self.kv_mode = kv_mode
        self.capacity = max_cache_len  # by another name: transformers 5.16 has a property `max_cache_len`
        self.layers: list[Any]
        super().__init__(layers=self._empty_layers() if layers is None else layers)
        self.takes_padding_mask = False  # for a pass that is split in two, whose masks the decoder makes itself
        self.batch = 0
        self.tail = 0  # token rows at the end of a pass that are not the base's, and have no K/V
        self.adapters: tuple[str, ...] | None = None  # whose K/V are in the rows behind the base's
        self._compressed = getattr(config, "kv_lora_rank", None) is not None

    @classmethod
    def from_base(cls, cache: Cache, config: PreTrainedConfig, kv_mode: KVMode, batch: int) -> StreamCache:
        """Go on from K/V that the base model wrote; `cache` stays as it is, and may serve again.

        Args:
            batch: sequences to generate; a multiple of those in the cache, whose rows are then repeated.

        Raises:
            ValueError: the Q stream cannot read K/V of the base, or these.
        """
        stream_cache = cls(config, kv_mode, layers=base_layers(cache, config, kv_mode) or None)
        repeat_for(stream_cache, batch)
        return stream_cache

    def _empty_layers(self) -> list[CacheLayerMixin]:
        if self.capacity is not None and self.kv_mode != "prompt":  # its prompt part does not grow in decoding
            return StaticCache(self.config, self.capacity).layers
        return DynamicCache(config=self.config).layers

    @property
    def is_compileable(self) -> bool:
        """For transformers: compile decoding, and prepare masks of four dimensions for it."""
        return self.capacity is not None and not self.takes_padding_mask

    @property
    def is_forked(self) -> bool:
        """Whether the streams have K/V of their own behind the prompt (`prompt` mode)."""
        return len(self.layers) > 0 and isinstance(self.layers[0], ForkedLayer)

    def check_usable(self, config: PreTrainedConfig, kv_mode: KVMode, batch: int) -> None:
        """Raise a ValueError where the cache is of another model or mode, or of another number of sequences."""
        check_layers(self, config)
        if kv_mode != self.kv_mode:
            raise ValueError(
                f"the cache is of kv_mode={self.kv_mode!r}, this model runs {kv_mode!r}: start with a fresh one"
            )
        check_batch(self.batch or batch, batch)

    def begin(self, batch: int, adapters: tuple[str, ...]) -> None:
        """Get ready for a pass over `batch` sequences with these adapters' streams.

        Raises:
            ValueError: an adapter has no K/V of its own in this cache.
        """
        self.batch = batch
        if self.is_forked and self.layers[0].joins_prefix != (self._compressed or not adapters):
            for layer in self.layers:  # a pass of the base alone has the attention of the base
                layer.joins_prefix = self._compressed or not adapters
        if self.adapters == adapters or self.kv_mode == "shared" or (self.kv_mode == "prompt" and not self.is_forked):
            return
        if self.adapters is None:
            self.adapters = adapters
            return
        for adapter in adapters:
            if adapter not in self.adapters:
                raise ValueError(
                    f"adapter {adapter!r} has no K/V of its own of the {self.get_seq_length()} tokens in this cache: "
                    "start with a fresh cache (an adapter can join or come back in the middle with kv_mode='shared' "
                    "alone)"
                )
        kept = [0, *(1 + self.adapters.index(adapter) for adapter in adapters)]
        rows = torch.cat([torch.arange(stream * batch, (stream + 1) * batch) for stream in kept])
        for layer in self.layers:
            own = layer.suffix if isinstance(layer, ForkedLayer) else layer
            if own.keys is not None and own.keys.shape[0] != batch:
                _select_rows(own, rows)
        self.adapters = adapters

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.kv_mode == "shared":
            tokens = slice(key_states.shape[-2] - self.tail)
            key_states, value_states = key_states[: self.batch, :, tokens], value_states[: self.batch, :, tokens]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def settle(self) -> None:
        """Let sliding layers that keep their past for `crop` forget what no further pass can see: before transformers
        5.24 such a layer shows all it keeps in the next pass."""
        for layer in self.layers:
            if getattr(layer, "record_past", False):
                layer.crop(0)

    def fork(self, adapters: tuple[str, ...]) -> None:
        """From here on each stream has K/V of its own; all read what is there already (`prompt` mode)."""
        self.layers = [ForkedLayer(layer, self.capacity) for layer in self.layers]
        self.adapters = adapters

    def prefix(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """The prompt's K/V, B rows, where `update` does not return them."""
        layer = self.layers[layer_idx]
        return layer.prefix if isinstance(layer, ForkedLayer) and not layer.joins_prefix else None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, ForkedLayer):
                layer.select_sequences(indices, self.batch)
            elif layer.keys is not None:
                _select_rows(layer, _rows_of_streams(indices, self.batch, layer.keys.shape[0]))
        self.batch = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.batch *= repeats

    def reset(self) -> None:
        """Empty the cache."""
        self.layers = self._empty_layers()
        self.batch = 0
        self.adapters = None


class ForkedLayer(CacheLayerMixin):
    """A layer of `prompt` mode: the base's K/V of the prompt, B rows that never change, and what each stream adds.

    `update` returns the streams' own K/V, or with `joins_prefix` prompt and own ones in one: where the model expands
    them after `update` (multi-head latent attention), and where its own attention reads them.
    """

    supports_early_init = False
    is_croppable = True

    def __init__(self, base: CacheLayerMixin, max_cache_len: int | None):
        self.start: int = base.get_seq_length()
        self.prefix = None if not self.start else (base.keys, base.values)
        self.joins_prefix = False
        self.suffix = DynamicLayer() if max_cache_len is None else StaticLayer(max_cache_len - self.start)
        self.is_sliding = bool(getattr(base, "is_sliding", False))
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        return self.suffix.keys

    @property
    def values(self) -> Tensor | None:
        return self.suffix.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        own = self.suffix.update(key_states, value_states)
        if not self.joins_prefix or self.prefix is None:
            return own
        streams = key_states.shape[0] // self.prefix[0].shape[0]
        first, second = (
            torch.cat([prompt.repeat(streams, 1, 1, 1), each], dim=2)
            for prompt, each in zip(self.prefix, own, strict=True)
        )
        return first, second

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = 0 if self.prefix is None else self.prefix[0].shape[2]  # a sliding layer has let go of the oldest ones
        return kept + self.suffix.get_mask_sizes(query_length)[0], self.start - kept

    def get_seq_length(self) -> int:
        return self.start + self.suffix.get_seq_length()

    def get_max_length(self) -> int:
        longest = self.suffix.get_max_length()
        return longest if longest < 0 else self.start + longest

    def crop(self, tokens_to_remove: int) -> None:
        own = self.suffix.get_seq_length()
        if -tokens_to_remove > own:
            raise ValueError(f"cannot take back {-tokens_to_remove} tokens: only {own} are not of the prompt")
        self.suffix.crop(tokens_to_remove)

    def select_sequences(self, indices: Tensor, batch: int) -> None:
        if self.prefix is not None:
            self.prefix = tuple(each.index_select(0, indices.to(each.device)) for each in self.prefix)
        if self.suffix.keys is not None:
            _select_rows(self.suffix, _rows_of_streams(indices, batch, self.suffix.keys.shape[0]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.prefix is not None:
            self.prefix = tuple(each.repeat_interleave(repeats, dim=0) for each in self.prefix)
        if self.suffix.keys is not None:
            self.suffix.batch_repeat_interleave(repeats)


def check_layers(cache: Cache, config: PreTrainedConfig) -> None:
    """Raise a ValueError where the cache has another number of layers than the model."""
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"the cache has {len(cache.layers)} layers, the model {config.num_hidden_layers}: it is another model's"
        )


def check_batch(rows: int, batch: int) -> None:
    """Raise a ValueError where a cache of `rows` sequences goes on with another number of them."""
    if rows == batch:
        return
    times = batch // rows
    remedy = f"repeat them with its batch_repeat_interleave({times}), or " if times * rows == batch else ""
    raise ValueError(f"the cache holds {rows} sequences, {batch} are to be generated: {remedy}start with a fresh one")


def base_layers(cache: Cache, config: PreTrainedConfig, kv_mode: KVMode) -> list[CacheLayerMixin]:
    """Layers that continue those of a cache of the base model, which they leave alone: they grow by concatenation.
    None of an empty cache.

    Raises:
        ValueError: the cache is of another kind, or the mode is `separate`.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        kind = type(cache).__name__
        raise ValueError(
            f"the cache is {'an offloaded' if kind == 'DynamicCache' else 'a'} {kind}; give the one that an earlier "
            "generate(..., return_dict_in_generate=True) of this model returned, or a DynamicCache that the base model "
            "filled"
        )
    if not cache.layers or not cache.get_seq_length():
        return []
    check_layers(cache, config)
    if kv_mode == "separate":
        raise ValueError(
            "a cache of the base model has no K/V of the Q stream, which kv_mode='separate' needs: give the one that "
            "an earlier generate(..., return_dict_in_generate=True) of this model returned"
        )
    return [copy.copy(layer) for layer in cache.layers]


def sequences_in(cache: Cache) -> int | None:
    """How many rows of K/V of the base a cache holds; None of an empty one."""
    return next((layer.keys.shape[0] for layer in cache.layers if layer.keys is not None), None)


def repeat_for(cache: Cache, batch: int) -> None:
    """Repeat each sequence of a cache, so that there are `batch`.

    Raises:
        ValueError: the batch is no multiple of the sequences in the cache.
    """
    rows = sequences_in(cache) or batch
    if batch % rows:
        raise ValueError(f"the cache holds {rows} sequences, {batch} are to be generated: give one, or as many")
    if batch != rows:  # once each would copy a long document for nothing
        cache.batch_repeat_interleave(batch // rows)


def _rows_of_streams(indices: Tensor, batch: int, rows: int) -> Tensor:
    """Row indices that pick the sequences `indices` in every stream."""
    return torch.cat([indices + offset for offset in range(0, rows, batch)])


def _select_rows(layer: CacheLayerMixin, rows: Tensor) -> None:
    assert layer.keys is not None and layer.values is not None
    layer.keys = layer.keys.index_select(0, rows.to(layer.keys.device))
    layer.values = layer.values.index_select(0, rows.to(layer.values.device))
