"""The two-stream models: vLLM's own, with Q rows behind the tokens of each step."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from fastqadapter.integrations.vllm import ARCHITECTURE_PREFIX, NATIVE, TRANSFORMERS
from fastqadapter.integrations.vllm.attention import check_attention, own_kv, share_kv
from fastqadapter.integrations.vllm.lora import attach
from fastqadapter.integrations.vllm.requests import Requests
from fastqadapter.integrations.vllm.rows import QRows, rows_of_step
from fastqadapter.integrations.vllm.served import RequestDials, Served
from fastqadapter.integrations.vllm.step import Step
from fastqadapter.integrations.vllm.weights import read_adapters


class TwoStreams:
    """Mixin over a causal LM of vLLM."""

    supports_lora = False  # vLLM's own would act on all rows
    supports_pp = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        model_config = vllm_config.model_config
        self.served = served = Served.of(model_config.hf_config)
        self.requests_key = vllm_config.instance_id
        self.most_requests = vllm_config.scheduler_config.max_num_seqs
        _check_head(self, served.logit_scale)
        dtype, device = model_config.dtype, next(self.parameters()).device  # type: ignore[attr-defined]
        if device.type == "cpu":
            dtype = torch.float32  # thin products in 16 bits take several times as long there
        self.step = Step(len(served.adapters), dtype, device)
        layers = check_attention(self)  # type: ignore[arg-type]
        for layer in layers:
            if served.kv_mode == "shared":
                share_kv(layer, self.step, served.max_adapters)
            else:
                own_kv(layer, self.step, vllm_config)
        adapters = read_adapters(model_config.model, served)
        attach(self, adapters, self.step, vllm_config.compilation_config.static_forward_context)  # type: ignore[arg-type]
        self._last: tuple[Any, QRows | None] = (None, None)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        q_rows: QRows | None | Literal["ask"] = "ask",
        **kwargs: Any,
    ) -> Tensor:
        """(N, D): hidden states that the LM head makes into logits of the customised policy.

        Args:
            q_rows: of this step, from runner V2; V1 gives none and the requests are asked.
        """
        tokens = positions.shape[-1]
        metadata = get_forward_context().attn_metadata
        rows = q_rows
        if metadata is None:
            rows = self._most_rows(tokens)
        elif isinstance(rows, str):
            rows = self._rows(metadata)
        if rows is not None:
            input_ids = None if input_ids is None else rows.behind(input_ids)
            inputs_embeds = None if inputs_embeds is None else rows.behind(inputs_embeds)
            positions = rows.behind(positions, dim=-1)
        with self.step.running(tokens, rows):
            hidden: Tensor = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
        return hidden if rows is None else rows.combine(hidden)

    def _most_rows(self, tokens: int) -> QRows | None:
        """For the profiling run, from which vLLM takes how much memory a step needs."""
        one = RequestDials(1.0, dict.fromkeys(range(self.served.max_adapters), 0.0))
        requests = tokens if self.served.kv_mode == "separate" else min(tokens, self.most_requests)
        starts = [*range(requests), tokens]
        return rows_of_step(starts, [one] * requests, [False] * requests, self.step.device)

    def _rows(self, metadata: Any) -> QRows | None:
        """Runner V1: of this step, from the metadata of attention and what the requests asked for."""
        requests = Requests.of_engine[self.requests_key]
        starts = next(iter(metadata.values())).query_start_loc.tolist()
        key = requests.changes, tuple(starts)
        if self._last[0] != key:  # most steps of decoding are like the one before
            self._last = key, requests.rows(starts, self.step.device)
        return self._last[1]

    @staticmethod
    def get_model_state_cls() -> type:
        """Runner V2's channel for the dials."""
        from fastqadapter.integrations.vllm.model_state import QAdapterModelState

        return QAdapterModelState


def _check_head(model: Any, logit_scale: float) -> None:
    """Let the LM head scale as the base's does; raise a ValueError where combined states would not give combined
    logits."""
    name = type(model).__name__.removeprefix(ARCHITECTURE_PREFIX)
    if getattr(model.logits_processor, "soft_cap", None) is not None:
        raise ValueError(f"{name} has a soft-cap behind its LM head, which vLLM cannot serve with a Q-Adapter")
    if getattr(model.lm_head, "bias", None) is not None:
        raise ValueError(f"{name} has a bias in its LM head, which vLLM cannot serve with a Q-Adapter")
    model.logits_processor.scale = logit_scale  # the Transformers backend knows only one name of it


def __getattr__(name: str) -> type:
    """`QAdapterLlamaForCausalLM` and so on, made when vLLM asks for it: each imports a model of vLLM."""
    architecture = name.removeprefix(ARCHITECTURE_PREFIX)
    if name == architecture or architecture not in (*NATIVE, TRANSFORMERS):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"vllm.model_executor.models.{NATIVE.get(architecture, 'transformers')}"
    native = getattr(importlib.import_module(module), architecture)
    made = type(name, (TwoStreams, native), {"__module__": __name__})
    globals()[name] = made
    return made
