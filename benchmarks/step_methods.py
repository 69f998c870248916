"""The methods that `train_step.py` compares, and the checks that they compute what they claim: no number on red."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

import fastqadapter as fqa
from benchmarks.peers import two_pass

OBJECTIVE = {"alpha_0": 1.0, "alpha_tilde": 1.0, "gamma": 1.0, "beta": 0.1}
RANK = 8

Row = dict[str, Any]  # a tokenised pair: prompt_ids, chosen_ids, rejected_ids


@dataclass(frozen=True)
class Method:
    """One way to run the step. `kv_mode=None` is the published computation; `targets=None` our default for the mode."""

    label: str
    kv_mode: str | None
    preset: str = "default"
    targets: tuple[str, ...] | None = None
    base_no_grad: bool = False


PUBLISHED = Method("published", None, "reference", ("q_proj", "v_proj"))
SEPARATE = Method("separate", "separate", "reference", ("q_proj", "v_proj"))
METHODS = (
    PUBLISHED,
    Method("published, base under no_grad", None, "reference", ("q_proj", "v_proj"), base_no_grad=True),
    SEPARATE,
    Method("prompt", "prompt"),
    Method("shared", "shared"),
    Method("shared, q_proj and o_proj only", "shared", targets=("q_proj", "o_proj")),
)


def load_model(method: Method, folder: str, dtype: torch.dtype) -> PeftModel:
    """The base model with the method's fresh adapter on it, ready to train."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(r=RANK, target_modules=list(method.targets) if method.targets else None, task_type="CAUSAL_LM")
    if method.kv_mode is None:
        return get_peft_model(base, lora).train()
    config = fqa.QAdapterConfig(**OBJECTIVE, kv_mode=method.kv_mode, preset=method.preset)
    return fqa.get_qadapter_model(base, config, lora).train()


def pad_rows(rows: list[Row], pad_id: int) -> two_pass.PaddedPairs:
    return two_pass.pad_pairs([(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows], pad_id)


def prepare_loss(method: Method, model: PeftModel, rows: list[Row], pad_id: int) -> Callable[[], Tensor]:
    """Collate one micro-batch; the function returned runs its forward pass."""
    if method.kv_mode is None:
        padded = pad_rows(rows, pad_id)
        return lambda: two_pass.two_pass_loss(model, padded, **OBJECTIVE, base_no_grad=method.base_no_grad)
    pad_action = pad_id if method.preset == "reference" else None
    packed = fqa.PreferenceCollator(None, None, pad_action=pad_action)(rows)
    return lambda: model(packed).loss


def loss_and_gradient(method: Method, model: PeftModel, rows: list[Row], pad_id: int) -> tuple[float, Tensor]:
    """Loss, and the gradient of the whole adapter as one fp32 vector."""
    loss = prepare_loss(method, model, rows, pad_id)()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([gradient.float().flatten() for gradient in gradients])


def randomize_adapter(model: PeftModel) -> None:
    """LoRA starts at zero, where the two passes of a method are the same and an error would stay unseen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def disagreement(folder: str, dtype: torch.dtype, rows: list[Row], pad_id: int) -> str | None:
    """The first check that fails on one micro-batch, or None. Prints what it found."""
    return separate_disagrees(folder, dtype, rows, pad_id) or untrained_disagrees(folder, dtype, rows, pad_id)


def separate_disagrees(folder: str, dtype: torch.dtype, rows: list[Row], pad_id: int) -> str | None:
    """Why `separate` is not the published computation, or None if it is.

    In fp32 both must agree: loss to 1e-5, gradient to 1e-3 of its norm. In the benchmark's dtype each rounds in its own
    way: ours may be off the fp32 result by twice the error of the published computation in that dtype, and by one
    rounding of it, for the case that the published error is small by luck.
    """
    published = load_model(PUBLISHED, folder, torch.float32)
    randomize_adapter(published)
    weights = get_peft_model_state_dict(published)
    true_loss, true_gradient = loss_and_gradient(PUBLISHED, published, rows, pad_id)
    del published

    def errors(method: Method, dtype: torch.dtype) -> tuple[float, float]:
        model = load_model(method, folder, dtype)
        set_peft_model_state_dict(model, weights)
        loss, gradient = loss_and_gradient(method, model, rows, pad_id)
        return abs(loss - true_loss) / abs(true_loss), float((gradient - true_gradient).norm() / true_gradient.norm())

    checks = [(errors(SEPARATE, torch.float32), (1e-5, 1e-3), torch.float32)]
    if dtype != torch.float32:
        rounding = torch.finfo(dtype).eps
        allowed = tuple(2 * error + rounding for error in errors(PUBLISHED, dtype))
        checks.append((errors(SEPARATE, dtype), allowed, dtype))
    for found, allowed, each in checks:
        loss, gradient = (f"{error:.1e} (allowed {limit:.1e})" for error, limit in zip(found, allowed, strict=True))
        print(f"separate against published, {each}: relative error of loss {loss}, of gradient {gradient}")
        if not all(error <= limit for error, limit in zip(found, allowed, strict=True)):  # NaN is red too
            return f"separate differs from the published computation in {each}"
    return None


def untrained_disagrees(folder: str, dtype: torch.dtype, rows: list[Row], pad_id: int) -> str | None:
    """An untrained adapter with a `difference` head has rewards 0 and loss log 2; which has not, or None.

    To 1e-5 in fp32, to one rounding in bf16: the two streams multiply different numbers of rows, and round differently.
    """
    for method in (method for method in METHODS if method.preset == "default"):
        for each, allowed in {torch.float32: 1e-5, dtype: max(1e-5, torch.finfo(dtype).eps)}.items():
            with torch.no_grad():
                loss = prepare_loss(method, load_model(method, folder, each), rows, pad_id)().item()
            error = abs(loss / math.log(2) - 1)
            print(f"{method.label}, untrained, {each}: relative error to log 2 {error:.1e} (allowed {allowed:.1e})")
            if not error <= allowed:
                return f"{method.label}: the untrained loss {loss} is not log 2 in {each}"
    return None
