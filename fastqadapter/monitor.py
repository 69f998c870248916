"""What is watched while a Q-Adapter trains: the metrics' means over pairs, and that nothing becomes NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastqadapter.loss import NonFiniteLossError
from fastqadapter.sharding import whole

Gather = Callable[[Tensor], Tensor]  # concatenates the tensors of all processes


class PairMeans:
    """Means over pairs of per-pair metrics, as running sums on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._pairs = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Count the metrics of a micro-batch, (B,) each."""
        for name, per_pair in metrics.items():
            total = per_pair.float().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._pairs += next(iter(metrics.values())).shape[0]

    def pop(self, gather: Gather) -> dict[str, float]:
        """The mean of each metric over all pairs and processes since the last call."""
        if not self._sums:
            return {}
        names, sums = list(self._sums), torch.stack(list(self._sums.values()))
        totals = gather(torch.cat([sums, sums.new_tensor([float(self._pairs)])])[None]).sum(dim=0).tolist()
        self.clear()
        return {name: total / totals[-1] for name, total in zip(names, totals, strict=False)}

    def clear(self) -> None:
        self._sums, self._pairs = {}, 0


class FiniteGuard(TrainerCallback):
    """Stops training before the optimizer steps on a loss or a gradient that is not finite.

    The losses wait on the device until then: one wait an optimizer step, not one a micro-batch.
    """

    def __init__(self, gather: Gather):
        self._gather = gather
        self._seen: list[tuple[Tensor, tuple[str, ...]]] = []

    def add(self, loss: Tensor, sources: tuple[str, ...]) -> None:
        """Remember the loss of a micro-batch, and the rows it came from."""
        self._seen.append((loss.detach(), sources))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        seen, self._seen = self._seen, []
        gradients = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
        device = gradients[0].device if gradients else next(model.parameters()).device
        losses = torch.stack([torch.zeros((), device=device), *(loss.float().to(device) for loss, _ in seen)])
        norm = whole(torch.nn.utils.get_total_norm(gradients)).to(device)
        if args.fp16:  # the gradient scaler skips a step with infinite gradients, and goes on with a smaller scale
            norm = torch.zeros_like(norm)
        # Every process must come to the same end, or the others wait for this one.
        finite = self._gather(torch.stack([losses.isfinite().all(), norm.isfinite()])[None]).all(dim=0)
        losses_are_finite, gradient_is_finite = finite.tolist()
        if losses_are_finite and gradient_is_finite:
            return
        bad = [
            (loss, rows) for loss, (_, rows) in zip(losses[1:].tolist(), seen, strict=True) if not math.isfinite(loss)
        ]
        if bad:
            what, rows = f"loss {bad[0][0]}", [row for _, rows in bad for row in rows]
        elif not losses_are_finite:
            what, rows = "loss not finite", ["of another process"]
        else:
            what, rows = f"gradient norm {norm.item()}", [row for _, rows in seen for row in rows]
        checkpoint = last_checkpoint(str(args.output_dir), state.global_step)
        raise NonFiniteLossError(
            f"{what} at step {state.global_step + 1} in rows {', '.join(rows)}; "
            f"last good checkpoint: {checkpoint or 'none yet'}; lower learning_rate or look at these rows"
        )


def last_checkpoint(folder: str, last_step: float = float("inf")) -> str | None:
    """The newest complete checkpoint in the output folder of a run, up to `last_step`; None where there is none.

    Trainer writes `trainer_state.json` at the end, so a checkpoint without it was cut off by a kill.
    """
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    steps = {int(number): path for path in complete if (number := path.name.rpartition("-")[2]).isdigit()}
    return max(((step, str(path)) for step, path in steps.items() if step <= last_step), default=(0, None))[1]


def check_finite_weights(model: nn.Module, folder: str) -> None:
    """Raise a `NonFiniteLossError` if a trained weight is NaN or infinite, rather than save it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(whole(parameter.isfinite().all())):
            raise NonFiniteLossError(f"weight {name!r} is not finite, so {folder} is not written; lower learning_rate")
