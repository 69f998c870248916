"""What a vLLM engine must be like to serve Q-Adapters; checked when its config is made."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from fastqadapter.integrations.vllm.requests import processor_name
from fastqadapter.integrations.vllm.served import Served
from fastqadapter.integrations.vllm.weights import read_adapters

logger = logging.getLogger(__name__)


class EngineCheck(VerifyAndUpdateConfig):
    """vLLM calls it for our architectures, in the process that makes the engine."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what does not go with two streams, and let requests carry dials.

        Raises:
            ValueError: an option that does not go with Q-Adapters, or a broken adapter; one line, with the remedy.
        """
        served = Served.of(vllm_config.model_config.hf_config)
        _check_options(vllm_config, served)
        adapters = read_adapters(vllm_config.model_config.model, served)  # a mistake shows here, not in a worker's log
        # Which layers have adapters is in the compiled graph, so it must be in the key of the cache of graphs.
        layers = json.dumps({name: sorted(pairs) for name, pairs in adapters.items()})
        vllm_config.additional_config = {
            **(vllm_config.additional_config or {}),
            "fastqadapter_layers": hashlib.sha256(layers.encode()).hexdigest(),
        }
        if served.kv_mode == "separate" and len(served.adapters) > 1 and vllm_config.cache_config.enable_prefix_caching:
            # A block is found by its tokens, and each adapter has K/V of its own for the same ones.
            logger.warning("prefix caching is off: several adapters in kv_mode 'separate'")
            vllm_config.cache_config.enable_prefix_caching = False
        if not current_platform.is_cpu():
            # The number of Q rows does not follow from that of tokens, except when all requests decode; and runner V1
            # looks at the metadata in the step, which a graph cannot.
            compilation = vllm_config.compilation_config
            compilation.mode = CompilationMode.NONE
            if compilation.cudagraph_mode != CUDAGraphMode.NONE:
                decodes = vllm_config.use_v2_model_runner
                compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY if decodes else CUDAGraphMode.NONE
        model_config = vllm_config.model_config
        model_config.logits_processors = [*(model_config.logits_processors or ()), processor_name(served)]


def _check_options(vllm_config: Any, served: Served) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    separate = served.kv_mode == "separate"
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "vLLM's own LoRA": vllm_config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "micro-batch overlap": parallel.use_ubatching,
        "pooling": vllm_config.model_config.runner_type == "pooling",
        # Blocks elsewhere are found by their tokens, and these K/V depend on the adapter.
        "K/V transfer, in kv_mode 'separate',": separate and vllm_config.kv_transfer_config is not None,
        "K/V offloading, in kv_mode 'separate',": separate and cache.kv_offloading_size is not None,
        "quantized K/V, in kv_mode 'separate',": separate and cache.cache_dtype not in ("auto", "bfloat16", "float16"),
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"{name} does not go with a Q-Adapter, whose rows it does not know: leave it out")
