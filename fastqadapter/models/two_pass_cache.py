"""Key-value caches of streams that run one after the other.

`TwoStreamCache` is the base stream's cache, and carries one cache more for each adapter whose mode needs its own K/V.
In `shared` mode it carries none: the Q stream reads the base K/V through a `ReadOnlyCache`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin


class TwoStreamCache(DynamicCache):
    """The base stream's K/V, B rows, and the Q streams' own caches by adapter name."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.config = config
        self.q_caches: dict[str, DynamicCache] = {}
        self._visible: dict[int, tuple[Tensor, Tensor]] = {}
        self.is_forked = False  # `prompt` mode: the streams have K/V of their own behind the prompt
        self._records_past = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append, and remember what the layer may see in this step: a sliding layer returns more than it keeps."""
        visible = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._visible[layer_idx] = visible
        return visible

    def read_only(self, rows: int) -> ReadOnlyCache:
        """What the last `rows` tokens see, for a pass of another stream over these tokens."""
        start = self.get_seq_length() - rows
        layers: list[CacheLayerMixin] = []
        for index, layer in enumerate(self.layers):
            visible = self._visible.get(index)
            layers.append(_ReadOnlyLayer(visible, start, rows, bool(getattr(layer, "is_sliding", False))))
        return ReadOnlyCache(layers=layers)

    def end_step(self) -> None:
        """Forget what was visible in the step."""
        self._visible.clear()

    def own_cache(self, adapter: str) -> DynamicCache:
        """The Q stream's own cache, made empty at the start of a sequence.

        Raises:
            ValueError: the adapter was not there for all of the sequence so far.
        """
        seen = self.get_seq_length()
        if adapter not in self.q_caches and seen == 0:
            self._adopt(adapter, DynamicCache(config=self.config))
        own = self.q_caches.get(adapter)
        if own is None or own.get_seq_length() != seen:
            found = "no K/V of its own" if own is None else f"K/V of its own for only {own.get_seq_length()}"
            raise ValueError(
                f"adapter {adapter!r} has {found} of the {seen} tokens in this cache: start with a fresh cache (an "
                "adapter can join or pause in the middle with kv_mode='shared' alone)"
            )
        return own

    def fork(self, adapter: str) -> None:
        """Let the Q stream go on from the base K/V of everything seen so far (`prompt` mode)."""
        forked = DynamicCache(config=self.config)
        forked.layers = [copy.copy(layer) for layer in self.layers]  # layers grow by concatenation, never in place
        self._adopt(adapter, forked)

    def _adopt(self, adapter: str, cache: DynamicCache) -> None:
        self.q_caches[adapter] = cache
        if self._records_past:
            cache.activate_past_recording()

    def activate_past_recording(self) -> None:
        """Keep what sliding layers would forget, so that `crop` can take tokens back (assisted decoding)."""
        super().activate_past_recording()
        self._records_past = True
        for cache in self.q_caches.values():
            cache.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        for cache in self.q_caches.values():
            cache.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for cache in self.q_caches.values():
            cache.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for cache in self.q_caches.values():
            cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for cache in self.q_caches.values():
            cache.batch_select_indices(indices)

    def reset(self) -> None:
        """Empty the cache; with layers of its own, since transformers 5.16 writes zeros into those it has, which may be
        those of a cache that the user gave."""
        self.layers = DynamicCache(config=self.config).layers
        self.q_caches.clear()
        self.is_forked = False


class _ReadOnlyLayer(CacheLayerMixin):
    """Keys and values that another stream wrote; `update` drops what this stream brings and returns them."""

    _can_checkpoint_with_cache = True

    def __init__(self, visible: tuple[Tensor, Tensor] | None, start: int, rows: int, is_sliding: bool):
        super().__init__()
        if visible is not None:
            self.keys, self.values = visible
        self.is_initialized = True
        self.is_sliding = is_sliding
        self.start = start
        self.rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        seen = self.keys.shape[-2]
        return seen, self.start + self.rows - seen

    def get_seq_length(self) -> int:
        """Tokens before the rows of this pass."""
        return self.start

    def get_max_length(self) -> int:
        return -1


class ReadOnlyCache(Cache):
    """A cache that is read and never written: the base K/V as the Q stream sees them in `shared` mode."""
