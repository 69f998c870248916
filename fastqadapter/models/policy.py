"""The customised policy as a causal LM of transformers: its forward returns the logits of
`pi~ = softmax((q + alpha_0 log pi) / alpha_tilde)`, so transformers' own `generate` samples, searches and streams it.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastqadapter.models import base
from fastqadapter.models.cache import CACHE_NAME, StreamCache
from fastqadapter.models.dials import Dials, combined_logits
from fastqadapter.models.passes import Passes, passes_for
from fastqadapter.models.step import Mask, Step
from fastqadapter.models.streams import TwoStreams, attributes

# What `generate` passes on and changes nothing here: the output is an object always, positions come as position_ids.
_IGNORED_INPUTS = frozenset({"return_dict", "cache_position", "tokenizer"})


class Policy:
    """The customised policy of one base model: runs the streams it needs, combines them."""

    def __init__(self, model: PreTrainedModel, streams: TwoStreams, dials: Dials):
        self.head = base.lm_head_of(model)
        self.dials = dials
        self.mixture = dials.mixture(self.head)
        self.kv_mode = streams.kv_mode
        self.is_assisted = False
        self.passes: Passes = passes_for(streams, dials.adapters)

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, L)
        attention_mask: Mask = None,  # (B, past + L), or as transformers makes it for a static cache
        position_ids: Tensor | None = None,  # (B, L)
        past_key_values: Cache | None = None,  # the name before transformers 5.24
        cache: Cache | None = None,  # the name since
        inputs_embeds: Tensor | None = None,  # (B, L, D)
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the customised policy, in the signature of a causal LM of transformers."""
        _refuse(attention_mask, labels, kwargs)
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        given = past_key_values if cache is None else cache
        kv_cache: Any = self.passes.new_cache() if given is None else self.passes.accepted_cache(given, tokens.shape[0])
        if position_ids is None:
            past = kv_cache.get_seq_length()
            position_ids = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        step = Step(tokens, attention_mask, position_ids.expand(tokens.shape[0], -1))
        rows = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else None
        hidden = self.passes.hidden_states(step, kv_cache, rows)
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, :, logits_to_keep]
        logits = combined_logits(hidden, self.head, self.mixture)
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: None if use_cache is False else kv_cache})

    def prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch: int, max_cache_len: int
    ) -> None:
        """Put the cache that `generate` starts with into `model_kwargs`."""
        self.is_assisted = mode == GenerationMode.ASSISTED_GENERATION
        self.mixture.check_sequences(batch)
        given, kind = model_kwargs.get(CACHE_NAME), generation_config.cache_implementation
        self._check_cache_options(generation_config, given)
        if given is not None:
            rows = batch * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            cache: Any = self.passes.accepted_cache(given, rows)
            if isinstance(cache, StreamCache) and 0 < (cache.capacity or 0) < max_cache_len:
                raise ValueError(
                    f"{CACHE_NAME} is static and holds {cache.capacity} tokens, {max_cache_len} are to be kept: "
                    "start with a fresh one"
                )
            cache._is_user_defined = True
            model_kwargs[CACHE_NAME] = cache
        elif generation_config.use_cache is not False:
            longest = max(max_cache_len, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs[CACHE_NAME] = self.passes.new_cache(longest if kind == "static" else None)

    def _check_cache_options(self, generation_config: Any, given: Any) -> None:
        """Raise a ValueError for options of `generate` that do not go with each other, or with the mode."""
        kind = generation_config.cache_implementation
        if self.kv_mode == "prompt" and generation_config.use_cache is False:
            raise ValueError("kv_mode='prompt' needs use_cache=True: the cache marks where the prompt ends")
        if self.kv_mode == "prompt" and generation_config.prefill_chunk_size is not None:
            raise ValueError("kv_mode='prompt' does not support prefill_chunk_size: leave it out")
        if kind == "static" and self.is_assisted:
            raise ValueError("cache_implementation='static' does not go with assisted decoding: leave one of them out")
        if given is not None and generation_config.use_cache is False:
            raise ValueError(f"use_cache=False with a given {CACHE_NAME}: leave one of them out")
        if given is not None and kind is not None:
            raise ValueError(f"cache_implementation={kind!r} is for a new cache, and one was given: leave one out")
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r} is not supported for two streams: use 'dynamic' or 'static'"
            )


def _refuse(attention_mask: Mask, labels: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for arguments of a base model's forward that the policy has no answer to."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask of four dimensions is {attention_mask.dtype}: give a bool one, true where a token is seen"
        )
    if labels is not None:
        raise ValueError("labels are not used here: train with packed pairs, model(PreferenceCollator(...)(rows))")
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    unknown = [f"{name}=True" if given[name] is True else name for name in given if name not in _IGNORED_INPUTS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is not available on the customised policy: it has two streams")


def check_uncached_input(
    inputs: Any = None, *, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any
) -> None:
    """Raise a ValueError where the cache given to `generate` holds all of the input: there would be nothing to run."""
    tokens, cache = input_ids if inputs is None else inputs, kwargs.get(CACHE_NAME, kwargs.get("past_key_values"))
    if not isinstance(cache, Cache) or not isinstance(tokens, Tensor):
        return
    only_new = isinstance(attention_mask, Tensor) and attention_mask.shape[1] != tokens.shape[1]
    if not only_new and cache.layers and cache.get_seq_length() >= tokens.shape[1]:
        raise ValueError(
            f"{CACHE_NAME} holds {int(cache.get_seq_length())} tokens, the input has {tokens.shape[1]}: give all "
            "tokens so far, those in the cache too, and at least one more"
        )


def check_assistant(model: PreTrainedModel, assistant_model: Any = None, **kwargs: Any) -> None:
    """Raise a ValueError where the assistant would be the policy itself: the base is that for the time of the call."""
    if kwargs.get("assistant_early_exit") is not None:
        raise ValueError("assistant_early_exit would run the policy as its own assistant: give an assistant_model")
    inner = assistant_model.get_base_model() if isinstance(assistant_model, PeftModel) else assistant_model
    if inner is model:
        raise ValueError("assistant_model is this very model, which is the policy meanwhile: load it a second time")


@functools.cache
def _policy_class(cls: Any) -> Any:
    """Subclass of a causal LM whose forward is that of the policy in `self._fqa_policy`; all else is inherited."""

    @functools.wraps(cls.forward)  # generate() reads the signature
    def forward(self: Any, input_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        return self._fqa_policy.forward(input_ids, **kwargs)

    def prepare_cache(self: Any, *args: Any) -> None:
        self._fqa_policy.prepare_cache(*args)

    def prepare_inputs(
        self: Any, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        cache: Any = kwargs.get(CACHE_NAME)
        if next_sequence_length is None and self._fqa_policy.is_assisted:
            # transformers 5.24 hands the tokens of a cache that the user gave over again.
            next_sequence_length = input_ids.shape[1] - int(cache.get_seq_length())
        split = [cache] if isinstance(cache, StreamCache) and next_sequence_length != 1 else []
        with attributes(split, takes_padding_mask=True):
            return cls.prepare_inputs_for_generation(
                self, input_ids, next_sequence_length=next_sequence_length, **kwargs
            )

    members = {
        "forward": forward,
        "prepare_inputs_for_generation": functools.wraps(cls.prepare_inputs_for_generation)(prepare_inputs),
        "_prepare_cache_for_generation": prepare_cache,
        "__module__": cls.__module__,  # transformers looks into the module's source
    }
    return type(f"Customised{cls.__name__}", (cls,), members)


@contextlib.contextmanager
def customised(model: PreTrainedModel, policy: Policy) -> Iterator[PreTrainedModel]:
    """`model` as the customised policy inside the context: its class is a subclass of its own, no module is copied."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(policy.passes.prepared())
        cls: Any = type(model)
        stack.callback(setattr, model, "__class__", cls)
        # If it is there, a callback of `generate` asks for a policy while another one runs.
        if "_fqa_policy" not in model.__dict__:
            model.__class__ = _policy_class(cls)
        overrides: dict[str, Any] = {"_fqa_policy": policy}
        if "forward" in model.__dict__:  # accelerate's hooks set one on the instance, which would shadow the policy's
            overrides["forward"] = types.MethodType(type(model).forward, model)
        stack.enter_context(attributes([model], **overrides))
        yield model
