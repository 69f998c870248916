"""What a vLLM engine must be like to serve Q-Adapters; checked when its config is made."""

from __future__ import annotations

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
        _check_options(vllm_config)
        read_adapters(vllm_config.model_config.model, served)  # a mistake in them is told here, not in a worker's log
        if served.kv_mode == "separate" and len(served.adapters) > 1 and vllm_config.cache_config.enable_prefix_caching:
            # A block is found by its tokens, and each adapter has K/V of its own for the same ones.
            logger.warning("prefix caching is off: several adapters in kv_mode 'separate'")
            vllm_config.cache_config.enable_prefix_caching = False
        if current_platform.is_cuda_alike():
            # The number of Q rows does not follow from that of tokens, except when all requests decode.
            compilation = vllm_config.compilation_config
            compilation.mode = CompilationMode.NONE
            if compilation.cudagraph_mode != CUDAGraphMode.NONE:
                compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        model_config = vllm_config.model_config
        model_config.logits_processors = [*(model_config.logits_processors or ()), processor_name(served)]


def _check_options(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "vLLM's own LoRA": vllm_config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "micro-batch overlap": parallel.use_ubatching,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"{name} does not go with a Q-Adapter, whose rows it does not know: leave it out")
