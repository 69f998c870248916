"""What a training run prints."""

from __future__ import annotations

from fastqadapter.progress import metric_line


def test_lines_show_what_one_looks_for_and_no_more() -> None:
    logs = {"loss": 0.45421, "grad_norm": 0.3, "rewards/accuracies": 1.0, "rewards/margins": 0.63972, "epoch": 0.2}
    assert metric_line(logs) == "loss 0.4542  accuracy 1  margin 0.6397"
    held_out = {f"eval_{name}": value for name, value in logs.items()}
    assert metric_line(held_out) == "held out: loss 0.4542  accuracy 1  margin 0.6397"
    assert metric_line({"train_runtime": 12.0}) == ""
