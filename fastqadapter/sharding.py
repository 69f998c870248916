"""Tensors that training shards over processes (FSDP2)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one; then every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
