"""The one tolerance of all accuracy tests and benchmark checks: never much worse than eager in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# What an implementation may add to twice the error of eager, relative to the largest entry of the truth: one unit
# in the last place of the 16-bit dtypes. In the others exp makes 128 units of one unit in a score of 128, float64 gets
# more because eager is the truth itself there, with an error of 0.
EPS: dict[torch.dtype, float] = {
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
    torch.float32: 2.0**-16,
    torch.float64: 2.0**-42,
}


def assert_close_to_truth(
    actual: Tensor,
    eager_same_dtype: Tensor,
    truth_fp64: Tensor,
    *,
    name: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Assert `err(actual) <= 2 err(eager_same_dtype) + EPS[dtype]`, `err(x) = max |x - truth| / max |truth|`.

    NaN and infinities must stand in `actual` exactly where they stand in the truth; only finite entries of the truth
    count as its scale (1 if they are all 0). An entry where eager itself is not finite does not widen the tolerance.

    Args:
        actual: result under test, any shape and dtype.
        eager_same_dtype: the eager reference on the same inputs.
        truth_fp64: the eager reference on the same inputs in float64.
        name: what is compared, for the message.
        dtype: storage dtype of the inputs under test; that of `actual` where it is None.

    Raises:
        AssertionError: it does not hold; the message names the worst entry.
    """
    shapes = {tuple(tensor.shape) for tensor in (actual, eager_same_dtype, truth_fp64)}
    assert len(shapes) == 1, f"{name}: shapes differ: {sorted(shapes)}"
    assert truth_fp64.dtype == torch.float64, f"{name}: the truth is {truth_fp64.dtype}, not torch.float64"
    storage = actual.dtype if dtype is None else dtype
    if truth_fp64.numel() == 0:
        return
    got, eager, truth = (tensor.detach().cpu().double() for tensor in (actual, eager_same_dtype, truth_fp64))
    finite = truth.isfinite()
    scale = truth[finite].abs().max().item() if finite.any() else 0.0
    # A difference is NaN where one of the two is, or where infinities meet: infinitely wrong, unless they agree.
    error = ((got - truth).abs() / (scale or 1.0)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    error[(got == truth) | (got.isnan() & truth.isnan())] = 0.0
    eager_error = ((eager - truth).abs() / (scale or 1.0))[finite & eager.isfinite()]
    worst_of_eager = eager_error.max().item() if eager_error.numel() else 0.0

    entry = int(error.argmax())
    worst = error.flatten()[entry].item()
    where = tuple(int(index) for index in torch.unravel_index(torch.tensor(entry, device="cpu"), error.shape))
    assert worst <= 2.0 * worst_of_eager + EPS[storage], (
        f"{name}: entry {where} is {got.flatten()[entry].item():g}, truth {truth.flatten()[entry].item():g}: relative "
        f"error {worst:.2g} > 2 * {worst_of_eager:.2g} (eager in {storage}) + {EPS[storage]:.2g}"
    )
