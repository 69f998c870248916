"""Arguments of `ops.soft_value` for its tests, and the options and dtypes that they go through."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from backend_cases import DTYPES, device_of
from fastqadapter import ops

float64 = functools.partial(torch.tensor, dtype=torch.float64)

# Every option of the head; True stands for a tensor that `problem` makes.
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale and biases": {"bias": True, "bias_q": True, "logit_scale": -0.4},
    "softcap": {"softcap": 3.0},
    "softcap of all": {"softcap": 3.0, "bias": True, "bias_q": True, "logit_scale": -0.4, "difference": True},
}
head_options = pytest.mark.parametrize("head", HEADS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclasses.dataclass(frozen=True)
class Problem:
    """The arguments of one call."""

    hidden_q: Tensor
    hidden_b: Tensor
    weight: Tensor
    options: dict[str, Any]

    def to(self, *where: Any) -> Problem:
        options = {name: x.to(*where) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return Problem(self.hidden_q.to(*where), self.hidden_b.to(*where), self.weight.to(*where), options)

    def value(self, backend: str) -> tuple[Tensor, Tensor]:
        """v (N,), base_lse (N,) on the device of the backend; without gradient unless hidden_q asks for one."""
        case = self.to(device_of(backend)) if self.weight.device.type == "cpu" else self
        return ops.soft_value(
            case.hidden_q, case.hidden_b, case.weight, **case.options, return_base_lse=True, backend=backend
        )

    def run(self, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """v (N,), base_lse (N,) and the gradient (N, D) of a fixed, uneven sum of the values."""
        hidden_q = self.hidden_q.detach().requires_grad_()
        value, lse = dataclasses.replace(self, hidden_q=hidden_q).value(backend)
        (value * torch.linspace(-1.0, 2.0, len(value)).to(value)).sum().backward()
        assert hidden_q.grad is not None and hidden_q.grad.dtype == hidden_q.dtype and self.weight.grad is None
        return value.detach().to(hidden_q.device), lse.to(hidden_q.device), hidden_q.grad


def problem(
    head: str = "plain",
    rows: int = 5,
    vocab: int = 37,
    size: int = 6,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Problem:
    """Random arguments, rounded to `dtype`; logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(rows + vocab + size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    options = {"alpha_0": 0.7, "alpha_tilde": 1.3, **HEADS[head], **options}
    options |= {name: normal(vocab) for name in ("bias", "bias_q") if options.get(name) is True}
    return Problem(normal(rows, size), normal(rows, size), normal(vocab, size) * 2 / size**0.5, options)
