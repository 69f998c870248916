"""Our LoRA layer computes what PEFT's computes, as exactly as PEFT's does in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastqadapter.models.lora import LeanLoraLinear, use_lean_lora
from fastqadapter.testing import assert_close_to_truth

D_IN, D_OUT = 24, 40
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D_IN, D_OUT, bias=False),
    "bias": lambda: nn.Linear(D_IN, D_OUT),
    "conv1d": lambda: Conv1D(D_OUT, D_IN),
}


def adapted_layer(kind: str, dtype: torch.dtype, **settings: object) -> LoraLinear:
    """A PEFT LoRA layer with random weights on a frozen layer; the adapter itself stays in fp32, or fp64 for fp64."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": LAYERS[kind]()}).double()
    fan = {"fan_in_fan_out": kind == "conv1d"}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], **fan, **settings)  # type: ignore[arg-type]
    layer = get_peft_model(model, lora).base_model.model["layer"]
    with torch.no_grad():
        for parameter in layer.parameters():
            # What bf16 and fp16 can hold, so that all dtypes start from the same numbers.
            parameter.copy_(torch.randn(parameter.shape, dtype=dtype) / 4)
    layer.get_base_layer().to(dtype)
    return layer.float() if dtype == torch.float32 else layer


def results(layer: LoraLinear, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of a fixed function of it by input and adapter."""
    x = x.detach().clone().requires_grad_()
    output = layer(x)
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=torch.float64).view_as(output)
    (output * weights.to(output.dtype)).sum().backward()
    found = {"output": output, "x": x.grad}
    for name in ("lora_A", "lora_B"):
        found[name] = getattr(layer, name)["default"].weight.grad
        getattr(layer, name)["default"].weight.grad = None
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, D_IN), (2, 5, D_IN), (1, 1, D_IN)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_equals_peft(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    layer = adapted_layer(kind, dtype)
    adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapter_dtype)
    eager = results(layer, x)
    use_lean_lora(nn.ModuleList([layer]))
    assert type(layer) is LeanLoraLinear
    ours = results(layer, x)
    layer.__class__ = LoraLinear
    truth = results(layer.double(), x.double())
    assert set(ours) == set(truth) == {"output", "x", "lora_A", "lora_B"}
    for name, tensor in ours.items():
        assert tensor.dtype == eager[name].dtype
        assert_close_to_truth(tensor, eager[name], truth[name], name=name, dtype=dtype)


def test_backward_twice_and_a_second_adapter() -> None:
    layer = adapted_layer("bias", torch.float32)
    use_lean_lora(nn.ModuleList([layer]))
    x = torch.randn(3, D_IN, requires_grad=True)
    output = layer(x).square().sum()
    first, second = (torch.autograd.grad(output, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    layer.update_layer("other", r=2, lora_alpha=2, config=LoraConfig(r=2, lora_alpha=2))
    expected = layer(x)
    layer.set_adapter(["default", "other"])  # a sum of two is PEFT's own business; "other" starts at zero
    torch.testing.assert_close(layer(x), expected)


def test_second_derivative_is_refused() -> None:
    """It would be silently wrong."""
    layer = adapted_layer("linear", torch.float64)
    use_lean_lora(nn.ModuleList([layer]))
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_what_is_not_plain_goes_the_way_of_peft(settings: dict[str, object]) -> None:
    layer = adapted_layer("bias", torch.float32, **settings)
    x = torch.randn(3, D_IN)
    torch.manual_seed(2)
    expected = layer(x)
    use_lean_lora(nn.ModuleList([layer]))
    torch.manual_seed(2)
    assert torch.equal(layer(x), expected)
