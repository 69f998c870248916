"""The customised policy as a causal LM of transformers: its forward returns the logits of
`pi~ = softmax((q + alpha_0 log pi) / alpha_tilde)`, so transformers' own `generate` samples, searches and streams it.

By identity 1 the hidden states are combined before the LM head: `logits = W (sum_i w_i d^i + alpha_0 h_b) /
alpha_tilde`, one product with the head whatever the number of adapters. A soft-cap forbids that; then each stream's
capped logits are formed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastqadapter.config import QHead
from fastqadapter.loss import LMHead
from fastqadapter.models import base
from fastqadapter.models.cache import CACHE_NAME, TwoStreamCache
from fastqadapter.models.streams import TwoStreams, attributes, lock_of
from fastqadapter.ops.checks import accumulation_dtype, check_alphas

LARGEST_SHARE = 1e6


@dataclasses.dataclass(frozen=True)
class Dials:
    """What can be turned at inference, per call.

    Raises:
        ValueError: a number outside its range, or a mixture that a `logits` head cannot express.
    """

    alpha_0: float
    alpha_tilde: float
    weights: Mapping[str, float]  # adapter name -> weight
    q_head: QHead = "difference"

    def __post_init__(self) -> None:
        check_alphas(self.alpha_0, self.alpha_tilde)
        for name, weight in {"alpha_0": self.alpha_0, **self.weights}.items():
            if abs(weight) > LARGEST_SHARE * self.alpha_tilde:
                raise ValueError(
                    f"{name}: {weight:g} / alpha_tilde {self.alpha_tilde:g} is above {LARGEST_SHARE:g}, where logits "
                    "overflow; a share that large is the plain argmax: use do_sample=False"
                )
        if self.q_head == "logits" and list(self.weights.values()) != [1.0]:
            raise ValueError(
                f"adapters={dict(self.weights)} needs q_head='difference': with 'logits' each adapter holds the base "
                "logits too, so it can only be used alone and with weight 1"
            )


def combined_logits(
    hidden_b: Tensor,  # (..., D)
    hidden_q: Mapping[str, Tensor],  # adapter name -> (..., D)
    head: LMHead,
    dials: Dials,
) -> Tensor:  # (..., V)
    """Logits of the customised policy (up to a constant of each row) from the last hidden states of the streams."""
    dtype = accumulation_dtype(head.weight.dtype)
    difference = dials.q_head == "difference"
    if head.softcap is None:
        combined = dials.alpha_0 * hidden_b.to(dtype)
        for name, hidden in hidden_q.items():
            d = hidden.to(dtype) - hidden_b.to(dtype) if difference else hidden.to(dtype)
            combined = combined + dials.weights[name] * d
        scaled = (combined * (head.logit_scale / dials.alpha_tilde)).to(head.weight.dtype)
        logits = F.linear(scaled, head.weight)
        if head.bias is None:
            return logits
        shares = dials.alpha_0 + (0.0 if difference else 1.0)
        return logits + head.bias * (shares * head.logit_scale / dials.alpha_tilde)
    base_logits = head.scale_and_cap(F.linear(hidden_b.to(head.weight.dtype), head.weight).to(dtype), head.bias)
    logits = dials.alpha_0 * base_logits
    for name, hidden in hidden_q.items():
        q = head.scale_and_cap(F.linear(hidden.to(head.weight.dtype), head.weight).to(dtype), head.bias)
        logits = logits + dials.weights[name] * (q - base_logits if difference else q)
    return logits / dials.alpha_tilde


# What `generate` passes on and changes nothing here: the output is an object always, positions come as position_ids.
_IGNORED_INPUTS = frozenset({"return_dict", "cache_position", "tokenizer"})


@dataclasses.dataclass(frozen=True)
class _Step:
    """The model inputs of one forward, all for the same L tokens."""

    tokens: Tensor  # (B, L) ids or (B, L, D) embeddings
    attention_mask: Tensor | None  # (B, past + L)
    position_ids: Tensor  # (B, L)

    def last(self, rows: int) -> _Step:
        return _Step(self.tokens[:, -rows:], self.attention_mask, self.position_ids[:, -rows:])

    def but_last(self) -> _Step:
        mask = None if self.attention_mask is None else self.attention_mask[:, :-1]
        return _Step(self.tokens[:, :-1], mask, self.position_ids[:, :-1])

    def decoder_inputs(self) -> dict[str, Tensor | None]:
        name = "inputs_embeds" if self.tokens.is_floating_point() else "input_ids"
        return {name: self.tokens, "attention_mask": self.attention_mask, "position_ids": self.position_ids}


class Policy:
    """The customised policy of one base model: runs the streams it needs, combines them."""

    def __init__(self, model: PreTrainedModel, streams: TwoStreams, dials: Dials):
        self.streams = streams
        self.head = base.lm_head_of(model)
        self.dials = dials
        # Weight 0 means "not there": its stream is not run at all.
        self.adapters = [name for name, weight in dials.weights.items() if weight != 0.0]

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, L)
        attention_mask: Tensor | None = None,  # (B, past + L)
        position_ids: Tensor | None = None,  # (B, L)
        past_key_values: TwoStreamCache | None = None,  # the name before transformers 5.24
        cache: TwoStreamCache | None = None,  # the name since
        inputs_embeds: Tensor | None = None,  # (B, L, D)
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the customised policy, in the signature of a causal LM of transformers."""
        cache = past_key_values if cache is None else cache
        self._refuse(labels, cache, kwargs)
        cache = TwoStreamCache(self.streams.decoder.config) if cache is None else cache
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        past, length = cache.get_seq_length(), tokens.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=tokens.device).expand(tokens.shape[0], -1)
        rows = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else length
        step = _Step(tokens, attention_mask, position_ids)
        with self.streams.without_checkpointing():
            hidden_b, hidden_q = self._hidden_states(step, cache, min(rows, length))
        cache.end_step()
        if isinstance(logits_to_keep, Tensor):
            hidden_b = hidden_b[:, logits_to_keep]
            hidden_q = {name: hidden[:, logits_to_keep] for name, hidden in hidden_q.items()}
        logits = combined_logits(hidden_b, hidden_q, self.head, self.dials)
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: None if use_cache is False else cache})

    def _refuse(self, labels: Tensor | None, cache: Any, kwargs: dict[str, Any]) -> None:
        if labels is not None:
            raise ValueError("labels are not used here: train with packed pairs, model(PreferenceCollator(...)(rows))")
        if cache is not None and not isinstance(cache, TwoStreamCache):
            raise ValueError(
                f"{CACHE_NAME} is a {type(cache).__name__}; the two streams need the cache that an earlier "
                "generate(..., return_dict_in_generate=True) of this model returned"
            )
        given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        unknown = [f"{name}=True" if given[name] is True else name for name in given if name not in _IGNORED_INPUTS]
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not available on the customised policy: it has two streams")

    def _hidden_states(self, step: _Step, cache: TwoStreamCache, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Last hidden states (B, rows, D) of the last `rows` tokens in the base stream and in each Q stream."""
        if self.streams.kv_mode == "prompt":
            return self._prompt_mode(step, cache, rows)
        own = self.streams.kv_mode == "separate"
        own_caches = {name: cache.own_cache(name) for name in self.adapters} if own else {}
        hidden_b = self._run_base(step, cache)[:, -rows:]
        hidden_q = {}
        for name in self.adapters:
            with self.streams.q_stream(name):
                if own:
                    hidden_q[name] = self._run(step, own_caches[name])[:, -rows:]
                else:
                    hidden_q[name] = self._run(step.last(rows), cache.read_only(rows))
        return hidden_b, hidden_q

    def _prompt_mode(self, step: _Step, cache: TwoStreamCache, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`prompt` mode: everything but the last prompt token is base K/V, then each stream goes on with its own."""
        if rows != 1:
            raise ValueError(
                f"kv_mode='prompt' gives logits from the last prompt token on, {rows} rows were asked for: pass "
                "logits_to_keep=1, or score responses with a packed batch"
            )
        length = step.tokens.shape[1]
        if cache.get_seq_length() == 0:
            if length > 1:
                self._run_base(step.but_last(), cache)
            for name in self.adapters:
                cache.fork(name)
            step = step.last(1)
        elif length > 1:
            raise ValueError(
                f"kv_mode='prompt' cannot take {length} tokens after the prompt at once: where the prompt ends decides "
                "which K/V the adapter reads; start with a fresh cache"
            )
        own_caches = {name: cache.own_cache(name) for name in self.adapters}
        hidden_b = self._run_base(step, cache)
        hidden_q = {}
        for name in self.adapters:
            with self.streams.q_stream(name):
                hidden_q[name] = self._run(step, own_caches[name])
        return hidden_b, hidden_q

    def _run_base(self, step: _Step, cache: TwoStreamCache) -> Tensor:
        with self.streams.base_stream():
            return self._run(step, cache)

    def _run(self, step: _Step, cache: Any) -> Tensor:
        output = self.streams.decoder(**step.decoder_inputs(), **{CACHE_NAME: cache}, use_cache=True)
        return output.last_hidden_state

    def prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Put the cache that `generate` starts with into `model_kwargs`."""
        given = model_kwargs.get(CACHE_NAME)
        if given is not None:
            self._refuse(None, given, {})
            given._is_user_defined = True
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported for two streams "
                "yet: leave it out"
            )
        if self.streams.kv_mode == "prompt":
            if generation_config.use_cache is False:
                raise ValueError("kv_mode='prompt' needs use_cache=True: the cache marks where the prompt ends")
            if generation_config.prefill_chunk_size is not None:
                raise ValueError("kv_mode='prompt' does not support prefill_chunk_size: leave it out")
        if generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = TwoStreamCache(self.streams.decoder.config)


@functools.cache
def _policy_class(cls: Any) -> Any:
    """Subclass of a causal LM whose forward is that of the policy in `self._fqa_policy`; all else is inherited."""

    @functools.wraps(cls.forward)  # generate() reads the signature
    def forward(self: Any, input_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        return self._fqa_policy.forward(input_ids, **kwargs)

    def prepare_cache(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        self._fqa_policy.prepare_cache(generation_config, model_kwargs)

    members = {
        "forward": forward,
        "_prepare_cache_for_generation": prepare_cache,
        "__module__": cls.__module__,  # transformers looks into the module's source
    }
    return type(f"Customised{cls.__name__}", (cls,), members)


@contextlib.contextmanager
def customised(model: PreTrainedModel, policy: Policy) -> Iterator[PreTrainedModel]:
    """`model` as the customised policy inside the context: its class is a subclass of its own, no module is copied."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_of(policy.streams.decoder))
        cls: Any = type(model)
        stack.callback(setattr, model, "__class__", cls)
        if (
            "_fqa_policy" not in model.__dict__
        ):  # else a callback of `generate` asks for a policy while another one runs
            model.__class__ = _policy_class(cls)
        overrides: dict[str, Any] = {"_fqa_policy": policy}
        if "forward" in model.__dict__:  # accelerate's hooks set one on the instance, which would shadow the policy's
            overrides["forward"] = types.MethodType(type(model).forward, model)
        stack.enter_context(attributes([model], **overrides))
        yield model
