"""PEFT's LoRA layer with less memory: the same numbers, without an fp32 copy of each layer's input.

PEFT casts the input of every adapted layer to the adapter's dtype and autograd keeps that copy: four bytes a feature,
once for q, o, gate, up and down each. Here autograd keeps the input itself, which several layers share, and the cast
is made again in the backward pass. The class is swapped in after PEFT has built the layer, so PEFT's files, names and
methods stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


class AddLowRankFunction(torch.autograd.Function):
    """`y += scaling (x A^T) B^T`, computed in the dtype of A and B, rounded once; x (..., D_in), y (..., D_out)."""

    @staticmethod
    def forward(ctx, x, y, lora_a, lora_b, scaling):  # type: ignore[no-untyped-def]
        # What is kept is allocated before what is freed, or it would pin the freed memory (19 of 274 MiB with glibc).
        low_rank = torch.empty((*x.shape[:-1], lora_a.shape[0]), dtype=lora_a.dtype, device=x.device)
        torch.matmul(x.to(lora_a.dtype), lora_a.T, out=low_rank)
        ctx.save_for_backward(x, low_rank, lora_a, lora_b)
        ctx.scaling = scaling
        ctx.mark_dirty(y)
        return y.copy_((low_rank @ lora_b.T).mul_(scaling).add_(y))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, low_rank, lora_a, lora_b = ctx.saved_tensors
        need_x, _, need_a, need_b, _ = ctx.needs_input_grad
        scaled = grad.to(lora_b.dtype) * ctx.scaling
        grad_low_rank = scaled @ lora_b
        grad_x = (grad_low_rank @ lora_a).to(x.dtype) if need_x else None
        grad_a = grad_low_rank.flatten(0, -2).T @ x.to(lora_a.dtype).flatten(0, -2) if need_a else None
        grad_b = scaled.flatten(0, -2).T @ low_rank.flatten(0, -2) if need_b else None
        return grad_x, grad, grad_a, grad_b, None


class LeanLoraLinear(LoraLinear):
    """PEFT's LoRA linear layer; anything but one plain active adapter goes PEFT's own way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._plain_adapter(x)
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x)
        lora_a, lora_b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return AddLowRankFunction.apply(x, y, lora_a, lora_b, self.scaling[adapter])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one active adapter where it is plain: no DoRA or other variant, no dropout, no bias, not merged."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        [adapter] = active
        dropout = self.lora_dropout[adapter]
        noisy = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
        special = adapter in self.lora_variant or self.lora_B[adapter].bias is not None
        return None if noisy or special or torch.is_autocast_enabled(x.device.type) else adapter


def use_lean_lora(model: nn.Module) -> None:
    """Swap the class of every plain LoRA linear layer of `model`; quantised layers keep PEFT's own."""
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = LeanLoraLinear
