"""One pass where the model allows it, else two, with the reason logged."""

from __future__ import annotations

import logging

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor

from fastqadapter.models.base import tuner_layers
from fastqadapter.models.one_pass import OnePass
from fastqadapter.models.step import Step
from fastqadapter.models.streams import TwoStreams, attributes, lock_of, ordinary_tokens, tolerance_of
from fastqadapter.models.two_pass import TwoPass

logger = logging.getLogger(__name__)

Passes = OnePass | TwoPass


def passes_for(streams: TwoStreams, adapters: tuple[str, ...]) -> Passes:
    """How to run the base stream and those of `adapters`. The first call tries one pass on a few tokens."""
    with lock_of(streams.decoder):
        if adapters and not streams.is_checked:
            streams.one_pass_refusal = _module_refusal(streams) or _trial_refusal(streams, adapters)
            streams.is_checked = True
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
    """Run a prompt and two more tokens both ways and compare: an architecture may mix its rows in its own way."""
    prompts = ordinary_tokens(streams.model, [(1, 2, 3, 4), (5, 6, 7, 8)])
    more = ordinary_tokens(streams.model, [(2, 9), (3, 1)])
    position_ids = torch.arange(6, device=prompts.device).expand(2, -1)
    steps = [(Step(prompts, None, position_ids[:, :4]), 1), (Step(more, None, position_ids[:, 4:]), 2)]

    def run(passes: Passes) -> Tensor:
        cache = passes.new_cache()
        with passes.prepared():
            return torch.cat([passes.hidden_states(step, cache, rows) for step, rows in steps], dim=2)

    name = type(streams.model).__name__
    with attributes(streams.model.modules(), training=False):
        expected = run(TwoPass(streams, adapters)).float()
        try:
            found = run(OnePass(streams, adapters)).float()
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            return f"{name} fails in one pass: {error}"
    difference = float((found - expected).norm() / expected.norm())
    if difference <= tolerance_of(streams):
        return None
    return f"{name} mixes its rows in a way that one pass does not know (relative difference {difference:.2g})"
