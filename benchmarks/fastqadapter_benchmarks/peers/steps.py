"""One training step of a micro-batch, forward and backward, as each method does it; and checks of what they compute.

`published` is the computation of the published scripts (`two_pass.py`), TRL's step that of its `DPOTrainer`: another
loss on the same pairs, with the base as the reference model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

import fastqadapter as fqa
from fastqadapter.config import KVMode, Preset
from fastqadapter.ops.backends import ENVIRONMENT_VARIABLE
from fastqadapter_benchmarks.peers import two_pass
from fastqadapter_benchmarks.race import Competitor
from fastqadapter_benchmarks.settings import Settings
from fastqadapter_benchmarks.workload import Row, load_base, lora, pairs, tokenizer

OBJECTIVE: dict[str, Any] = {"alpha_0": 0.9, "alpha_tilde": 0.7, "gamma": 1.0, "beta": 0.1}
Step = Callable[[list[Row]], Callable[[], Any]]  # collates a micro-batch; what it returns is timed


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to compute the Q-Adapter loss. `kv_mode=None` is the published one; `targets=None` the mode's default."""

    kv_mode: KVMode | None
    preset: Preset = "default"
    targets: tuple[str, ...] | None = None
    base_no_grad: bool = False
    backend: str | None = None

    def load(self, base: PreTrainedModel) -> PeftModel:
        """The base with the method's fresh adapter on it, ready to train."""
        torch.manual_seed(0)
        config = lora(target_modules=list(self.targets) if self.targets else None)
        if self.kv_mode is None:
            return get_peft_model(base, config).train()
        qadapter = fqa.QAdapterConfig(**OBJECTIVE, kv_mode=self.kv_mode, preset=self.preset)
        return fqa.get_qadapter_model(base, qadapter, config).train()

    def loss_of(self, model: PeftModel, rows: list[Row], pad_id: int) -> Callable[[], Tensor]:
        """Collate the micro-batch; the function returned runs its forward pass."""
        if self.kv_mode is None:
            padded = pad_rows(rows, pad_id)
            padded = two_pass.PaddedPairs(*(tensor.to(model.device) for tensor in padded))
            return lambda: two_pass.two_pass_loss(model, padded, **OBJECTIVE, base_no_grad=self.base_no_grad)
        pad_action = pad_id if self.preset == "reference" else None
        packed = fqa.PreferenceCollator(None, None, pad_action=pad_action)(rows).to(model.device)
        return lambda: model(packed).loss


PUBLISHED_TARGETS = ("q_proj", "v_proj")
PUBLISHED = Method(None, "reference", PUBLISHED_TARGETS)
SEPARATE = Method("separate", "reference", PUBLISHED_TARGETS)
METHODS = {
    "fastqadapter, shared": Method("shared"),
    "fastqadapter, prompt": Method("prompt"),
    "fastqadapter, separate (the published function)": SEPARATE,
    "published": PUBLISHED,
}
# Near to others in time, and so not worth the wait of a quick run: the published step with its base pass under no_grad,
# as would be fairer, and ours on other backends.
MORE_METHODS = {
    "published, base under no_grad": dataclasses.replace(PUBLISHED, base_no_grad=True),
    "fastqadapter, shared, torch backend": Method("shared", backend="torch"),
    "fastqadapter, shared, eager backend": Method("shared", backend="eager"),
}
DPO = "TRL DPOTrainer"
NOTES = {
    "fastqadapter, shared": "LoRA on q, o, MLP",
    "fastqadapter, prompt": "LoRA on all linear layers",
    "fastqadapter, separate (the published function)": "LoRA on q, v",
    "published": "LoRA on q, v",
    DPO: "another loss; LoRA on q, v",
}


def pad_rows(rows: list[Row], pad_id: int) -> two_pass.PaddedPairs:
    return two_pass.pad_pairs([(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows], pad_id)


def pad_id_of(model: str) -> int:
    tokens = tokenizer(model)
    return tokens.eos_token_id if tokens.pad_token_id is None else tokens.pad_token_id


def stepper(settings: Settings, model_name: str, label: str) -> Step:
    """The step of a method, on a model of its own."""
    base = load_base(model_name, settings.device)
    if label == DPO:
        return _dpo_stepper(settings, model_name, base)
    method = (METHODS | MORE_METHODS)[label]
    model, pad_id = method.load(base), pad_id_of(model_name)

    def collate(rows: list[Row]) -> Callable[[], Any]:
        loss_of = method.loss_of(model, rows, pad_id)

        def run() -> Tensor:
            overrides = {ENVIRONMENT_VARIABLE: method.backend} if method.backend else {}
            with mock.patch.dict(os.environ, overrides):
                loss = loss_of()
                loss.backward()
            model.zero_grad(set_to_none=True)
            return loss.detach()

        return run

    return collate


def _dpo_stepper(settings: Settings, model_name: str, base: PreTrainedModel) -> Step:
    """`DPOTrainer.training_step`, on batches of its own collator, which takes rows tokenised as ours."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    row = {"prompt": "Hello", "chosen": " there", "rejected": " you"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder, use_cpu=not settings.on_gpu, bf16=False, report_to=[], disable_tqdm=True, logging_strategy="no",
            gradient_checkpointing=False, max_length=None,
        )  # fmt: skip
        trainer = DPOTrainer(
            base,
            args=arguments,
            train_dataset=Dataset.from_list([row] * 2),
            processing_class=tokenizer(model_name),
            peft_config=lora(target_modules=list(PUBLISHED_TARGETS)),
        )
    trainer.current_gradient_accumulation_steps = 1  # set by train(), which does more than a step

    def collate(rows: list[Row]) -> Callable[[], Any]:
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        collated = trainer.data_collator([{key: row[key] for key in keys} for row in rows])
        batch = {name: tensor.to(settings.device) for name, tensor in collated.items()}

        def run() -> Tensor:
            loss = trainer.training_step(trainer.model, dict(batch))
            trainer.model.zero_grad(set_to_none=True)
            return loss.detach()

        return run

    return collate


# Competitors


def in_turn(settings: Settings, model: str, label: str, batches: list[list[Row]]) -> Callable[[], Any]:
    """A call that takes the next micro-batch each time; the first, uncounted, is the warm-up."""
    step = stepper(settings, model, label)
    calls = itertools.cycle([step(rows) for rows in batches])
    first = next(calls)
    waiting = itertools.chain([first, first], calls)
    return lambda: next(waiting)()


def after_warm_up(settings: Settings, model: str, label: str, rows: list[Row]) -> Callable[[], Any]:
    """A call that runs a step on next to nothing the first time, and on the micro-batch from then on."""
    step = stepper(settings, model, label)
    tiny, whole = step([{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}]), step(rows)
    waiting = itertools.chain([tiny], itertools.repeat(whole))
    return lambda: next(waiting)()


def competitors(
    settings: Settings, model: str, labels: Sequence[str], batches: list[list[Row]]
) -> Iterator[Competitor]:
    for label in labels:
        arguments = settings, model, label
        build = functools.partial(in_turn, *arguments, batches)
        yield Competitor(label, build, NOTES.get(label, ""), functools.partial(after_warm_up, *arguments, batches[0]))


# Checks


def loss_and_gradient(method: Method, model: PeftModel, rows: list[Row], pad_id: int) -> tuple[float, Tensor]:
    """Loss, and the gradient of the whole adapter as one fp32 vector."""
    loss = method.loss_of(model, rows, pad_id)()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([gradient.float().flatten() for gradient in gradients])


def randomize_adapter(model: PeftModel) -> None:
    """LoRA starts at zero, where the two passes of a method are the same and an error would stay unseen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


@functools.cache
def check(settings: Settings, model_name: str, pairs_checked: int = 2) -> None:
    """On one micro-batch, in float32 and bf16.

    Raises:
        AssertionError: something does not compute what it claims.
    """
    rows = pairs(settings, pairs_checked, model_name)
    found = [*disagreements(settings, model_name, rows, torch.bfloat16)]
    assert not found, "; ".join(found)


def disagreements(settings: Settings, model_name: str, rows: list[Row], dtype: torch.dtype) -> Iterator[str]:
    """What does not compute what it claims, on one micro-batch: nothing is timed while there is any."""
    yield from _separate_is_published(settings, model_name, rows, dtype)
    yield from _untrained_is_the_base(settings, model_name, rows, dtype)
    yield from _fast_is_eager(settings, model_name, rows)


def _separate_is_published(settings: Settings, model_name: str, rows: list[Row], dtype: torch.dtype) -> Iterator[str]:
    """In fp32 both must agree: loss to 1e-5, gradient to 1e-3 of its norm. In the benchmark's dtype each rounds in its
    own way: ours may be off the fp32 result by twice the error of the published computation in that dtype, and by one
    rounding of it, for the case that the published error is small by luck."""
    pad_id = pad_id_of(model_name)
    published = PUBLISHED.load(load_base(model_name, settings.device, torch.float32))
    randomize_adapter(published)
    weights = get_peft_model_state_dict(published)
    true_loss, true_gradient = loss_and_gradient(PUBLISHED, published, rows, pad_id)
    for label, method in MORE_METHODS.items():
        if method.base_no_grad:
            loss, gradient = loss_and_gradient(method, published, rows, pad_id)
            if not (
                abs(loss / true_loss - 1) <= 1e-5 and (gradient - true_gradient).norm() <= 1e-3 * true_gradient.norm()
            ):
                yield f"{label}: not the published loss and gradient"
    del published

    def errors(method: Method, dtype: torch.dtype) -> tuple[float, float]:
        model = method.load(load_base(model_name, settings.device, dtype))
        set_peft_model_state_dict(model, weights)
        loss, gradient = loss_and_gradient(method, model, rows, pad_id)
        return abs(loss - true_loss) / abs(true_loss), float((gradient - true_gradient).norm() / true_gradient.norm())

    checks = [(errors(SEPARATE, torch.float32), (1e-5, 1e-3), torch.float32)]
    if dtype != torch.float32:
        rounding = torch.finfo(dtype).eps
        of_loss, of_gradient = (2 * error + rounding for error in errors(PUBLISHED, dtype))
        checks.append((errors(SEPARATE, dtype), (of_loss, of_gradient), dtype))
    for found, allowed, each in checks:
        if not all(error <= limit for error, limit in zip(found, allowed, strict=True)):  # NaN is red too
            yield f"separate is not the published computation in {each}: off by {found}, allowed {allowed}"


def _untrained_is_the_base(settings: Settings, model_name: str, rows: list[Row], dtype: torch.dtype) -> Iterator[str]:
    """With both alphas 1 an untrained adapter with a `difference` head has rewards 0 and loss log 2, to 1e-5 in fp32
    and to one rounding in bf16: the two streams multiply different numbers of rows, and round differently."""
    for label, method in METHODS.items():
        if method.preset != "default":
            continue
        for each, allowed in {torch.float32: 1e-5, dtype: max(1e-5, torch.finfo(dtype).eps)}.items():
            with torch.no_grad(), mock.patch.dict(OBJECTIVE, alpha_0=1.0, alpha_tilde=1.0):
                model = method.load(load_base(model_name, settings.device, each))
                loss = method.loss_of(model, rows, pad_id_of(model_name))().item()
            if not abs(loss / math.log(2) - 1) <= allowed:
                yield f"{label}: the loss of an untrained adapter is {loss} in {each}, not log 2"


def _fast_is_eager(settings: Settings, model_name: str, rows: list[Row]) -> Iterator[str]:
    """A trained adapter has the loss (1e-5) and gradient (1e-3) of the eager backend, in fp32, on every other."""
    for label, method in (METHODS | MORE_METHODS).items():
        if method.preset != "default" or method.kv_mode is None or method.backend == "eager":
            continue
        model = method.load(load_base(model_name, settings.device, torch.float32))
        randomize_adapter(model)
        found = []
        for backend in (method.backend or "auto", "eager"):
            with mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: backend}):
                found.append(loss_and_gradient(method, model, rows, pad_id_of(model_name)))
        (loss, gradient), (true_loss, true_gradient) = found
        errors = abs(loss / true_loss - 1), float((gradient - true_gradient).norm() / true_gradient.norm())
        if not (errors[0] <= 1e-5 and errors[1] <= 1e-3):
            yield f"{label}: loss and gradient are off the eager backend by {errors}"
