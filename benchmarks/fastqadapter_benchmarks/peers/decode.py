"""Customised generation as PEFT alone offers it, written anew: the yardsticks of `test_decode.py`.

* Two passes, as the published code: the base model's forward, then the adapter's, each with its own KV cache and LM
  head, `log pi` and the combination over the whole vocabulary in fp32. It runs inside transformers' own generate, as a
  logits processor, which is how transformers' classifier-free guidance runs its second pass.
* PEFT's mixed batch (`adapter_names=["__base__", ...]`): one forward on both streams' rows, one cache with both.

Neither shares code with `fastqadapter`. Both compute `softmax((q + alpha_0 log pi) / alpha_tilde)` with `q = W (h_q -
h_b)`, the streams' own K/V (`separate` mode).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def combine(base_logits: Tensor, adapted_logits: Tensor, alpha_0: float, alpha_tilde: float) -> Tensor:
    """(B, V) log-policy up to a constant of each row, in fp32."""
    log_pi = torch.log_softmax(base_logits.float(), dim=-1)
    q = adapted_logits.float() - base_logits.float()
    return (q + alpha_0 * log_pi) / alpha_tilde


class TwoPasses(LogitsProcessor):
    """`generate` is the base's, with a processor in it that runs the adapter's pass on what is new and combines.

    One model, whose adapter is switched off and on for each pass, as in the published code. With `base`, a second model
    on the same weights makes the base pass, and nothing is switched.
    """

    def __init__(
        self, adapted: PeftModel, alpha_0: float = 1.0, alpha_tilde: float = 1.0, base: PreTrainedModel | None = None
    ):
        self.adapted = adapted
        self.switches = base is None
        self.base = adapted.get_base_model() if base is None else base
        self.alphas = alpha_0, alpha_tilde
        self.kv_cache = DynamicCache(config=self.base.config)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids[:, self.kv_cache.get_seq_length() :]
        self._switch(on=True)
        output = self.adapted(input_ids=new, logits_to_keep=1, **{CACHE_NAME: self.kv_cache})
        self._switch(on=False)
        return combine(scores, output.logits[:, -1], *self.alphas)

    def generate(self, *args: Any, logits_processor: Sequence[LogitsProcessor] = (), **kwargs: Any) -> Any:
        """Every call starts anew. The second pass comes before all other processors."""
        self.kv_cache = DynamicCache(config=self.base.config)
        self._switch(on=False)
        try:
            processors = LogitsProcessorList([self, *logits_processor])
            return self.base.generate(*args, logits_processor=processors, **kwargs)
        finally:
            self._switch(on=True)

    def _switch(self, *, on: bool) -> None:
        if self.switches and on:
            self.adapted.base_model.enable_adapter_layers()
        elif self.switches:
            self.adapted.base_model.disable_adapter_layers()


class MixedBatch:
    """Steps of greedy decoding by PEFT's mixed batch; rows [base; adapter]."""

    def __init__(self, model: PeftModel, alpha_0: float = 1.0, alpha_tilde: float = 1.0):
        self.model = model
        self.alphas = alpha_0, alpha_tilde
        self.kv_cache = DynamicCache(config=model.get_base_model().config)

    def step(self, tokens: Tensor) -> Tensor:
        """(B, L) new tokens -> (B, V) scores behind them."""
        names = ["__base__"] * len(tokens) + [self.model.active_adapter] * len(tokens)
        inputs = {"input_ids": tokens.repeat(2, 1), "logits_to_keep": 1, CACHE_NAME: self.kv_cache}
        logits = self.model(**inputs, adapter_names=names).logits[:, -1]
        base, adapted = logits.chunk(2)
        return combine(base, adapted, *self.alphas)
