"""Whole models on a GPU against the same models on the CPU: training, generation, compiled steps.

The CPU's own tests are tests/test_models_training.py, test_models_generation.py and test_compiled.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import fastqadapter as fqa
from generation_cases import PROMPTS, each_mode, ids_of, trained_twins
from tiny import PAD, loss_and_gradients, make_twins

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")

NAMES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "mistral")
each_name = pytest.mark.parametrize("name", NAMES)
CUDA_GRAPHS: dict[str, Any] = {
    "cache_implementation": "static",
    "compile_config": CompileConfig(fullgraph=True, mode="reduce-overhead"),
}


def tokens(model: fqa.QAdapterModel, **options: Any) -> list[list[int]]:
    inputs = {name: ids.to(model.device) for name, ids in ids_of(*PROMPTS).items()}
    found = model.generate(**inputs, do_sample=False, pad_token_id=PAD, max_new_tokens=12, **options)
    return found[:, inputs["input_ids"].shape[1] :].tolist()


@each_mode
@each_name
def test_loss_and_gradients(name: str, kv_mode: str) -> None:
    model = make_twins(name, kv_mode, alpha_0=0.9, alpha_tilde=0.7).model
    expected, gradients = loss_and_gradients(model)
    found, on_gpu = loss_and_gradients(copy.deepcopy(model).to("cuda"))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in gradients.items():
        assert (on_gpu[parameter].cpu() - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, parameter


@each_mode
@each_name
def test_generation(name: str, kv_mode: str) -> None:
    """Greedy tokens, with the growing cache and with the static one."""
    model = trained_twins(name, kv_mode).model
    on_gpu = copy.deepcopy(model).to("cuda")
    expected = tokens(model)
    assert tokens(on_gpu) == expected
    assert tokens(on_gpu, cache_implementation="static") == expected


@each_mode
def test_compiled_steps_on_cuda_graphs(kv_mode: str) -> None:
    model = trained_twins("llama", kv_mode).model
    on_gpu = copy.deepcopy(model).to("cuda")
    for _ in range(2):  # records the graphs, then replays them
        assert tokens(on_gpu, **CUDA_GRAPHS) == tokens(model)
