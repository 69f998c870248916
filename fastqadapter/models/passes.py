"""One pass where the model allows it, else two, with the reason logged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from fastqadapter.models.base import tuner_layers
from fastqadapter.models.loading import first_not_finite
from fastqadapter.models.one_pass import OnePass
from fastqadapter.models.step import Step
from fastqadapter.models.streams import (
    ARCHITECTURE_ERRORS,
    TwoStreams,
    attributes,
    ordinary_tokens,
    tolerance_of,
)
from fastqadapter.models.two_pass import TwoPass

logger = logging.getLogger(__name__)

Passes = OnePass | TwoPass


def passes_for(streams: TwoStreams, adapters: tuple[str, ...]) -> Passes:
    """How to run the base stream and those of `adapters`. The first call tries one pass on a few tokens."""
    if adapters and not streams.is_checked:
        streams.one_pass_refusal = _module_refusal(streams) or _trial_refusal(streams, adapters)
        diverged = any(first_not_finite(streams.decoder, adapter) for adapter in adapters)
        streams.is_checked = not diverged  # it may be mended
        if streams.one_pass_refusal is not None:
            logger.warning("generation takes two passes, about twice the time: %s", streams.one_pass_refusal)
    if streams.one_pass_refusal is not None:
        return TwoPass(streams, adapters)
    if adapters not in streams.one_passes:  # kept: another object would be compiled anew
        streams.one_passes[adapters] = OnePass(streams, adapters)
    return streams.one_passes[adapters]


def _module_refusal(streams: TwoStreams) -> str | None:
    """Why one pass cannot serve, as far as the modules tell."""
    for name, module in tuner_layers(streams.decoder):
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper) or "experts" in name.split("."):
            return f"the adapter is on experts ({name}), where tokens change places"
        if any(parameter.is_meta for parameter in module.parameters()):
            return f"weights of {name} are offloaded"
    return None


@torch.no_grad()
def _trial_refusal(streams: TwoStreams, adapters: tuple[str, ...]) -> str | None:
    """Run a prompt and two more tokens both ways and compare: an architecture may mix its rows in its own way.

    The rows of the adapters get noise below the first adapted layer, so that they are others than the base's even
    where the adapters are not trained yet.
    """
    prompts = ordinary_tokens(streams.model, [(1, 2, 3, 4), (5, 6, 7, 8)])
    more = ordinary_tokens(streams.model, [(2, 9), (3, 1)])
    position_ids = torch.arange(6, device=prompts.device).expand(2, -1)
    steps = [(Step(prompts, None, position_ids[:, :4]), 1), (Step(more, None, position_ids[:, 4:]), 2)]

    noise: list[Tensor] = []

    def run(passes: Passes) -> Tensor:
        cache: Any = passes.new_cache()
        with passes.prepared(), _noise_on_adapters(streams, passes, noise):
            return torch.cat([passes.hidden_states(step, cache, rows) for step, rows in steps], dim=2)

    name = type(streams.model).__name__
    with attributes(streams.model.modules(), training=False), torch.autocast(prompts.device.type, enabled=False):
        expected = run(TwoPass(streams, adapters)).float()
        try:
            found = run(OnePass(streams, adapters)).float()
        except torch.OutOfMemoryError:
            raise
        except ARCHITECTURE_ERRORS as error:
            return f"{name} fails in one pass: {error}"
    difference = float((found - expected).norm() / expected.norm())
    if difference <= tolerance_of(streams) or not bool(expected.isfinite().all()):
        return None
    return f"{name} mixes its rows in a way that one pass does not know (relative difference {difference:.2g})"


@contextlib.contextmanager
def _noise_on_adapters(streams: TwoStreams, passes: Passes, noise: list[Tensor]) -> Iterator[None]:
    """Add the same noise to every row of an adapter, as it comes to the first adapted layer. `noise` is drawn where it
    is empty."""

    def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        noisy = (args[0] if args else kwargs["hidden_states"]).clone()
        if not noise:
            drawn = torch.randn(noisy.shape[-1], generator=torch.Generator().manual_seed(0))
            noise.append(noisy.std() * drawn.to(noisy.device, noisy.dtype))
        if isinstance(passes, OnePass):
            own = noisy[:0] if passes.rows.base_alone else passes.rows.own(noisy)
        else:
            own = noisy[:0] if streams.adapters_are_disabled() else noisy
        own += noise[0]
        return ((noisy, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": noisy})

    layers = streams.layers[streams.trunk_depth : streams.trunk_depth + 1]
    handles = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
