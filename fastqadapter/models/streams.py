"""Two streams over one frozen model: the base stream (adapters off) and the Q stream (an adapter on).

Training runs two passes over a packed batch. 1. Base pass, no grad, over all token rows; records K/V where the mode
shares them. 2. Q pass, with grad: over all token rows in `separate` mode, over the state rows alone in `prompt` and
`shared`. Layers below the first adapted one are the same in both streams (the trunk): the Q pass skips them and starts
from the base pass's hidden states.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastqadapter.config import KVMode
from fastqadapter.models import base
from fastqadapter.models.attention import PackedAttention, base_segments, packed_attention_of, q_segments
from fastqadapter.models.lora import use_lean_lora
from fastqadapter.models.row_lora import RowLoraLayers, StreamRows
from fastqadapter.packing import PackedPairs, pack_pairs

# What an architecture raises that does not fit.
ARCHITECTURE_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError)

# One thread at a time runs streams on a decoder: they switch adapters and attention on the modules themselves.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(decoder: nn.Module) -> Any:
    """The lock under which a thread may run streams on `decoder`; the same thread may take it again."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(decoder, threading.RLock())


class TwoStreams:
    """Runs the decoder of one base model as base stream or as Q stream."""

    def __init__(self, model: PreTrainedModel, kv_mode: KVMode):
        self.model = model
        self.decoder = base.decoder_of(model)
        self.decoder_config = self.decoder.config.get_text_config(decoder=True)
        self.layers = base.decoder_layers(self.decoder)
        self.kv_mode = kv_mode
        self._running: list[StreamRows] = []
        self.refresh()

    def refresh(self) -> None:
        """Look again for adapted layers, after an adapter was added or removed."""
        use_lean_lora(self.decoder)
        self.lora_layers = RowLoraLayers(self.decoder)
        self.tuner_layers: list[BaseTunerLayer] = [module for _, module in base.tuner_layers(self.decoder)]
        self.frozen_modules = base.frozen_modules(self.model)
        self.trunk_depth = base.first_adapted_layer(self.layers)
        # What `passes_for` finds out: whether one pass was tried, why not to take it, and the passes themselves.
        self.is_checked = False
        self.one_pass_refusal: str | None = None
        self.one_passes: dict[tuple[str, ...], Any] = {}

    def adapters_are_disabled(self) -> bool:
        """Whether the user has turned them off with PEFT's `disable_adapter_layers`."""
        return bool(self.tuner_layers) and all(layer.disable_adapters for layer in self.tuner_layers)

    @contextlib.contextmanager
    def base_stream(self) -> Iterator[None]:
        """Adapters off, no gradient.

        PEFT's own `disable_adapter()` walks all modules and turns `requires_grad` of every adapter off and on again;
        the flag alone is enough here.
        """
        with torch.no_grad(), attributes(self.tuner_layers, _disable_adapters=True):
            yield

    @contextlib.contextmanager
    def q_stream(self, adapter: str | None = None) -> Iterator[None]:
        """Adapters on; `adapter` alone where it is named, else the active one."""
        active = {} if adapter is None else {"_active_adapter": [adapter]}
        with attributes(self.tuner_layers, _disable_adapters=False, **active):
            yield

    @contextlib.contextmanager
    def without_checkpointing(self) -> Iterator[None]:
        """A checkpointed layer gets no cache from transformers, and the Q stream would read no K/V."""
        checkpointed = [layer for layer in self.layers if getattr(layer, "gradient_checkpointing", False)]
        with attributes(checkpointed, gradient_checkpointing=False):
            yield

    @contextlib.contextmanager
    def running_pass(self, rows: StreamRows) -> Iterator[None]:
        """Mark that the layers are set up for passes of several streams."""
        self._running.append(rows)
        try:
            yield
        finally:
            self._running.pop()

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Inside a call that runs several streams at once: let the layers be as outside of it."""
        running, self._running = self._running, []
        for rows in running:
            rows.streams = 1
        try:
            with attributes(self.lora_layers.layers, stream_rows=None):
                yield
        finally:
            self._running = running

    def packed_hidden_states(self, batch: PackedPairs, adapter: str | None = None) -> tuple[Tensor, Tensor]:
        """Last hidden states of both streams at the state rows of a packed batch.

        Returns:
            `hidden_q` (S, D), with a graph where gradients are on, and `hidden_b` (S, D) without.
        """
        hidden_b, [hidden_q] = self.stream_states(batch, [adapter])
        return hidden_q, hidden_b

    def stream_states(self, batch: PackedPairs, adapters: Sequence[str | None]) -> tuple[Tensor, list[Tensor]]:
        """The same of any number of adapters, with one base pass: (S, D) of the base, and of each Q stream."""
        if self._running:  # a callback of `generate` asks for a loss
            with self._paused():
                return self.stream_states(batch, adapters)
        if batch.base is not None and self.kv_mode != "separate":
            raise ValueError(
                f"the batch brings base states, but in kv_mode={self.kv_mode!r} the base pass makes K/V too"
            )
        rows = batch.state_rows()
        recorded: dict[int, tuple[Tensor, Tensor]] | None = None
        if self.kv_mode != "separate" and adapters:
            recorded = {}
        base_pass = PackedAttention(base_segments(batch), "own", recorded, first_read=self.trunk_depth)
        with packed_attention_of(self.decoder):
            trunk: list[Any] = []
            if batch.base is not None:
                hidden_b = batch.base.hidden
            else:
                with self.base_stream(), self._tap_trunk() as trunk:
                    hidden_b = self._run(batch.input_ids, batch.position_ids, base_pass).index_select(0, rows)
            if self.kv_mode == "separate":  # the same segments on its own K/V, and so the same masks
                q_pass = base_pass
            else:
                kv_axis = "base" if self.kv_mode == "shared" else "base+own"
                q_pass = PackedAttention(q_segments(batch, self.kv_mode), kv_axis, recorded)
            return hidden_b, [self._q_states(batch, adapter, q_pass, trunk, rows) for adapter in adapters]

    def _q_states(
        self, batch: PackedPairs, adapter: str | None, q_pass: PackedAttention, trunk: list[Any], rows: Tensor
    ) -> Tensor:
        """The Q pass of one adapter: over all token rows in `separate` mode, over the state rows in the others."""
        read = None if self.kv_mode == "separate" else rows
        ids, positions = batch.input_ids, batch.position_ids
        if read is not None:
            ids, positions = ids.index_select(0, read), positions.index_select(0, read)
        with self.q_stream(adapter), self._start_above_trunk(trunk, read), self._recompute_as_q(adapter):
            hidden = self._run(ids, positions, q_pass)
        return hidden.index_select(0, rows) if read is None else hidden

    def _run(self, input_ids: Tensor, position_ids: Tensor, packed: PackedAttention) -> Tensor:
        """One pass over packed rows: (T,) tokens -> (T, D) last hidden states."""
        output = self.decoder(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, packed=packed
        )
        return output.last_hidden_state[0]

    @contextlib.contextmanager
    def _recompute_as_q(self, adapter: str | None) -> Iterator[None]:
        """Under gradient checkpointing a layer runs again in the backward pass, when the contexts of the Q pass are
        long left; let it enter them again."""

        def as_q(function: Callable[..., Any], *args: Any) -> Any:
            with lock_of(self.decoder), packed_attention_of(self.decoder), self.q_stream(adapter):
                return function(*args)

        def wrap(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
            return lambda function, *args: checkpoint(functools.partial(as_q, function), *args)

        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                if getattr(layer, "gradient_checkpointing", False):
                    checkpoint: Any = layer._gradient_checkpointing_func
                    stack.enter_context(attributes([layer], _gradient_checkpointing_func=wrap(checkpoint)))
            yield

    @contextlib.contextmanager
    def _tap_trunk(self) -> Iterator[list[Any]]:
        """Collect what the last layer of the trunk hands on: hidden states (1, T, D), or a tuple that begins so."""
        tapped: list[Any] = []
        if self.trunk_depth == 0:
            yield tapped
            return
        last = self.layers[self.trunk_depth - 1]
        handle = last.register_forward_hook(lambda module, args, output: tapped.append(output))
        try:
            yield tapped
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _start_above_trunk(self, trunk: list[Any], rows: Tensor | None) -> Iterator[None]:
        """Make the trunk's layers hand their input on, and the last of them the base's hidden states instead."""
        if not trunk:
            yield
            return
        [output] = trunk
        above: Tensor = output[0] if isinstance(output, tuple) else output
        above = above if rows is None else above.index_select(1, rows)

        def as_output(hidden_states: Tensor) -> Any:
            return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

        def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return as_output(hidden_states)

        def enter(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            # Reentrant checkpointing wants an input that requires grad; `enable_input_require_grads` made one.
            return as_output(above.detach().requires_grad_(hidden_states.requires_grad))

        # An instance attribute shadows the method; accelerate's device hooks may have set one already.
        *lower, last = self.layers[: self.trunk_depth]
        with (
            attributes(lower, forward=skip, gradient_checkpointing=False),
            attributes([last], forward=enter, gradient_checkpointing=False),
        ):
            yield


@torch.no_grad()
def check_servable(model: PreTrainedModel, kv_mode: KVMode) -> None:
    """Run a few tokens packed and compare with the model's own forward: an architecture may attend in its own way.

    Raises:
        ValueError: the packed passes fail on this architecture, or compute something else.
    """
    streams = TwoStreams(model, kv_mode)
    streams.trunk_depth = 0  # without an adapter all layers would be trunk, and the Q pass empty
    tokens = ordinary_tokens(model, [(1, 2, 3, 4, 5), (1, 2, 3, 7, 8)])
    [first, second] = tokens.tolist()
    batch = pack_pairs([(first[:3], [*first[3:], second[4]], second[3:])])
    name = type(model).__name__
    try:
        with attributes(model.modules(), training=False):
            hidden_states = streams.decoder(input_ids=tokens, use_cache=False).last_hidden_state
            hidden_q, hidden_b = streams.packed_hidden_states(batch.to(tokens.device))
    except torch.OutOfMemoryError:
        raise
    except ARCHITECTURE_ERRORS as error:
        raise ValueError(f"{name} cannot be served with kv_mode={kv_mode!r}: {error}") from error
    expected = torch.cat([hidden_states[0, 2:], hidden_states[1, 3:4]]).float()
    for stream in (hidden_b, hidden_q):
        difference = float((stream.float() - expected).norm() / expected.norm())
        if not difference <= tolerance_of(streams):
            raise ValueError(
                f"{name} attends in a way that packed passes do not know (relative difference {difference:.2g} with "
                f"kv_mode={kv_mode!r}); try attn_implementation='eager', or report the architecture"
            )


def ordinary_tokens(model: PreTrainedModel, tenths: list[tuple[int, ...]]) -> Tensor:
    """Token ids at so many tenths of the vocabulary: special ones in a row make the activations chaotic."""
    weight = model.get_input_embeddings().weight
    return (torch.tensor(tenths, device=weight.device) * weight.shape[0]) // 10


def tolerance_of(streams: TwoStreams) -> float:
    """Relative difference that rounding may make. Another function is off by 1 or so; rounding by 5e-7 in fp32, by
    0.014 in bf16 (SmolLM2-135M, 30 layers)."""
    dtypes = {parameter.dtype for parameter in streams.decoder.parameters()}
    exact = dtypes <= {torch.float32, torch.float64} and not getattr(streams.model, "is_quantized", False)
    return 1e-3 if exact else 0.3


_MISSING = object()


@contextlib.contextmanager
def attributes(modules: Iterable[Any], **values: Any) -> Iterator[None]:
    """Set attributes on the instances inside the context, and put them back."""
    modules = list(modules)
    before = [{name: module.__dict__.get(name, _MISSING) for name in values} for module in modules]
    try:
        for module in modules:
            for name, value in values.items():
                setattr(module, name, value)
        yield
    finally:
        for module, former in zip(modules, before, strict=True):
            for name, value in former.items():
                if value is not _MISSING:
                    setattr(module, name, value)
                elif name in module.__dict__:
                    delattr(module, name)
