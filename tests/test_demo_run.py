"""The demo's run and its measures, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastqadapter as fqa
from fastqadapter.demo import measure
from fastqadapter.demo.run import Size, format_report, run_demo
from fastqadapter.monitor import last_checkpoint
from tiny import make_twins, tiny_base
from words import word_tokenizer

TINY = Size(train_pairs=40, heldout_pairs=6, questions=2, epochs=1.0, answer_tokens=4)


def run_tiny(folder: Path) -> dict:
    return run_demo(tiny_base("llama"), word_tokenizer(), folder, kv_mode="shared", seed=0, size=TINY)


@pytest.mark.parametrize("kv_mode", ["separate", "prompt", "shared"])
@pytest.mark.parametrize("strength", [0.0, 1.0, -0.5])
def test_kl_from_base(kv_mode: str, strength: float) -> None:
    """Against the sum over the vocabulary of pi (log pi - log pi~), token by token from the model's own logits."""
    twins = make_twins("llama", kv_mode, alpha_0=0.4, alpha_tilde=1.3)
    prompt, answer = [5, 6, 7, 8], [9, 10, 11]
    batch = fqa.packing.pack([(prompt, [answer])])
    expected = []
    for length in range(len(answer)):
        ids = torch.tensor([prompt + answer[:length]])
        with torch.no_grad():
            base = torch.log_softmax(twins.base(input_ids=ids).logits[0, -1], dim=-1)
            twins.model.eval()
            scores = policy_scores(twins.model, prompt, answer[:length], strength)
        policy = torch.log_softmax(scores, dim=-1)
        expected.append((base.exp() * (base - policy)).sum().item())
    found = measure.kl_from_base(twins.model, batch, strength)
    assert found == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert found >= 0


def policy_scores(model: fqa.QAdapterModel, prompt: list[int], answer: list[int], strength: float) -> torch.Tensor:
    """Logits of the policy after `prompt + answer`, by generating exactly these tokens."""

    def force(_: int, ids: torch.Tensor) -> list[int]:
        return [answer[len(ids) - len(prompt)]] if len(ids) - len(prompt) < len(answer) else list(range(97))

    output = model.generate(
        torch.tensor([prompt]),
        adapters={"default": strength},
        max_new_tokens=len(answer) + 1,
        prefix_allowed_tokens_fn=force,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.logits[-1][0]


def test_a_run_leaves_everything_it_promises(tmp_path: Path) -> None:
    report = run_tiny(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.md").read_text() == format_report(report, tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert report["before"]["margin"] == pytest.approx(0, abs=1e-6)
    assert report["before"]["kl_from_base"] == pytest.approx(0, abs=1e-6)
    assert report["after"]["pref_loss"] < report["before"]["pref_loss"]
    assert [entry["strength"] for entry in report["answers"]] == [0.0, 0.5, 1.0, 1.5]
    assert all(len(entry["samples"]) == 2 for entry in report["answers"])
    loaded = fqa.QAdapterModel.from_pretrained(tiny_base("llama"), tmp_path / "adapter")
    assert loaded.qadapter_config.kv_mode == "shared"


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kl_from_base, calls = measure.kl_from_base, []

    def killed(*args: object) -> float:
        calls.append(args)
        if len(calls) == 2:  # after the training
            raise KeyboardInterrupt
        return kl_from_base(*args)

    with monkeypatch.context() as patched:
        patched.setattr(measure, "kl_from_base", killed)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path)
    assert last_checkpoint(str(tmp_path / "checkpoints")) is not None
    report = run_tiny(tmp_path)
    assert report["optimizer_steps"] == 5
    uninterrupted = run_tiny(tmp_path / "uninterrupted")
    assert report["after"] == uninterrupted["after"]
