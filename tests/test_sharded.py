"""The LM head under DeepSpeed ZeRO-3, which empties parameters outside of their module's forward. A stand-in does what
DeepSpeed does to them; FSDP2 itself runs in test_distributed.py."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from fastqadapter.models import sharded
from tiny import PAIRS, lora_gradients, make_twins, packed


@pytest.mark.parametrize("name", ["llama", "phi"])  # phi's head has a bias
def test_gathered_by_deepspeed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = make_twins(name, "shared").model
    batch = packed(PAIRS, model)
    expected = model(batch).loss
    expected.backward()
    gradients = lora_gradients(model)
    model.zero_grad()

    head = model.get_output_embeddings()
    partitioned = {parameter: parameter.data for parameter in head.parameters()}

    @contextlib.contextmanager
    def gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = partitioned[parameter].clone()
        yield
        release()

    def release() -> None:
        for parameter in partitioned:
            parameter.data = torch.empty(0)

    deepspeed = types.ModuleType("deepspeed")
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=gathered)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setattr(sharded, "is_deepspeed_zero3_enabled", lambda: True)
    release()
    loss = model(batch).loss
    loss.backward()
    assert torch.equal(loss, expected)
    for parameter, gradient in lora_gradients(model).items():
        torch.testing.assert_close(gradient, gradients[parameter])
