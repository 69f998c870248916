"""Q-Adapters on vLLM: the customised policy inside its engine, with one KV cache for base and adapters.

A step of vLLM runs N tokens of many requests. Here R rows come behind them: copies of the tokens whose logits are
wanted, at the same positions, on which LoRA acts. Norms, linear layers and rotary embeddings run over all N + R rows as
they are. In attention (`attention.py`) the R rows are further query heads of their tokens and read the same K/V, so
that scheduler, paging and prefix cache are those of the base model. The hidden states are combined before the LM head
(`rows.py`), so that sampling, logprobs and guided decoding act on the customised policy.

vLLM loads the plugin through the entry point `vllm.general_plugins`; nothing of it is patched. Written against vLLM
0.32 (https://docs.vllm.ai); `docs/serving.md` says what has run.
"""

from __future__ import annotations

ARCHITECTURE_PREFIX = "QAdapter"

# Models of vLLM's own in which linear layers, norms and `Attention` do what the rows above need. Others go through
# vLLM's Transformers backend.
NATIVE = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
TRANSFORMERS = "TransformersForCausalLM"


def served_architecture(architecture: str) -> str:
    """Name under which vLLM finds the two-stream model of an architecture of transformers."""
    return ARCHITECTURE_PREFIX + (architecture if architecture in NATIVE else TRANSFORMERS)


def register() -> None:
    """Tell vLLM of our models. It calls this in each of its processes, more than once, before anything is loaded."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from fastqadapter.integrations.vllm.engine import EngineCheck

    for architecture in (*NATIVE, TRANSFORMERS):
        name = ARCHITECTURE_PREFIX + architecture
        ModelRegistry.register_model(name, f"{__name__}.models:{name}")
        MODELS_CONFIG_MAP[name] = EngineCheck
