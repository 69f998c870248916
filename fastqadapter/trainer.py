"""`QAdapterTrainer`: transformers' Trainer on preference pairs, with TRL's constructor, column and metric names."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from fastqadapter.base_cache import cached_rows
from fastqadapter.config import CONFIG_NAME, QAdapterConfig, read_sidecar
from fastqadapter.data import PreferenceCollator, TokenizedRows, tokenize_rows
from fastqadapter.loss import NonFiniteLossError
from fastqadapter.models import QAdapterModel, QAdapterOutput, get_qadapter_model
from fastqadapter.models.loading import adapter_folder
from fastqadapter.models.sharded import loading_whole
from fastqadapter.monitor import FiniteGuard, PairMeans, check_finite_weights
from fastqadapter.packing import PackedPairs
from fastqadapter.rows import longest_branch

__all__ = ["NonFiniteLossError", "QAdapterTrainer", "QAdapterTrainingArguments"]

logger = logging.getLogger(__name__)

Rows = Iterable[Mapping[str, Any]]


@dataclasses.dataclass
class QAdapterTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the defaults and the data options of Q-Adapter training."""

    learning_rate: float = dataclasses.field(default=3e-4, metadata={"help": "initial learning rate of the adapter"})
    logging_steps: float = dataclasses.field(default=10, metadata={"help": "log every so many optimizer steps"})
    logging_nan_inf_filter: bool = dataclasses.field(
        default=False, metadata={"help": "leave it off: training stops at a non-finite loss instead of hiding it"}
    )
    remove_unused_columns: bool = dataclasses.field(
        default=False, metadata={"help": "leave it off: the collator takes the columns it knows"}
    )
    max_length: int | None = dataclasses.field(
        default=1024, metadata={"help": "most tokens of prompt + response, the end is cut off; 0: no limit"}
    )
    on_bad_row: Literal["raise", "skip"] = dataclasses.field(
        default="raise", metadata={"help": "'raise' at a malformed row, or 'skip' and count it"}
    )
    cache_base: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "folder to keep the base's hidden states of the training pairs in, so that steps in separate mode "
            "need no base pass"
        },
    )
    disable_dropout: bool = dataclasses.field(
        default=True, metadata={"help": "train without lora_dropout: the Q stream is compared with a noiseless base"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_length = self.max_length or None
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} is outside its legal range [2, inf), or 0 for no limit")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} is outside its legal range (0, inf)")
        if self.gradient_accumulation_steps < 1:
            value = self.gradient_accumulation_steps
            raise ValueError(f"gradient_accumulation_steps={value} is outside its legal range [1, inf)")
        for name in ("neftune_noise_alpha", "label_smoothing_factor"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} has no meaning in this method; leave it out")
        strategy = getattr(self, "train_sampling_strategy", "random")  # before transformers 5: group_by_length
        if getattr(strategy, "value", strategy) == "group_by_length":
            raise ValueError("train_sampling_strategy='group_by_length' saves padding, and packed pairs have none")
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # else torch warns
        if self.on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row={self.on_bad_row!r} is not one of 'raise', 'skip'")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the preference columns; leave it False")


class QAdapterTrainer(Trainer):
    """Train a Q-Adapter on preference pairs.

    The batch loss is the mean over pairs, so gradient accumulation over any micro-batches, the last short one too,
    gives the gradient of one large batch (presets `default` and `paper`; `reference` averages r^2 over the tokens of
    the micro-batch, as published). Logged beside Trainer's own numbers, and with the prefix `eval_` in evaluation:
    `pref_loss`, `chi2_loss`, `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`,
    `logps/chosen`, `logps/rejected`, `q_values/mean`, `values/mean`, all means over pairs.

    Args:
        model: a causal LM, its folder or hub id, or a `QAdapterModel`.
        ref_model: None, for TRL's sake: the reference is the base model itself, with its adapters off.
        args: `QAdapterTrainingArguments`.
        data_collator: default `PreferenceCollator`.
        train_dataset: rows `prompt/chosen/rejected` (a list, a `datasets.Dataset`, or `read_rows(path)`).
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; default: the one of the model.
        compute_metrics: None, for TRL's sake: there are no predictions to hand over, all metrics are logged.
        callbacks, optimizers: as in Trainer.
        quantization_config: for a model given by name.
        peft_config: a `LoraConfig` for a new adapter; default rank 8, `lora_alpha` 16. Not with a `QAdapterModel`.
        qadapter_config: hyper-parameters of a new adapter; default `QAdapterConfig()`. Not with a `QAdapterModel`.

    Raises:
        ValueError: arguments that contradict each other, or rows that cannot be used.
        NonFiniteLossError: while training, at the first loss that is NaN or infinite.
    """

    # The loss is divided by the pairs of the whole optimizer step in `compute_loss`.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | QAdapterModel | str,
        ref_model: None = None,
        args: QAdapterTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], PackedPairs] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        qadapter_config: QAdapterConfig | None = None,
    ):
        args = args or QAdapterTrainingArguments()
        if not isinstance(args, QAdapterTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}; give fastqadapter.QAdapterTrainingArguments")
        _check_unused(ref_model, compute_metrics)
        _use_one_gpu(args)
        model = str(model) if isinstance(model, os.PathLike) else model
        if processing_class is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            processing_class = AutoTokenizer.from_pretrained(name)
        set_seed(args.seed)  # Trainer does it too, but after the adapter has got its random weights
        with loading_whole():
            model = _as_qadapter_model(model, qadapter_config, peft_config, quantization_config)
        _check_vocabulary(model, processing_class)
        if args.disable_dropout:
            _disable_dropout(model)

        def tokenized(rows: Rows | None, which: str = "") -> TokenizedRows | None:
            if isinstance(rows, TokenizedRows) and not rows:
                raise ValueError(f"{which}no row left: the rows are empty")
            if rows is None or isinstance(rows, TokenizedRows):
                return rows
            if isinstance(rows, str):
                raise ValueError(f"the dataset is the string {rows!r}: give rows, of a file by read_rows({rows!r})")
            try:
                return tokenize_rows(rows, processing_class, max_length=args.max_length, on_bad_row=args.on_bad_row)
            except ValueError as error:
                raise ValueError(f"{which}{error}") from error

        if data_collator is None:
            data_collator = PreferenceCollator(
                processing_class, args.max_length, pad_action=_pad_action(model.qadapter_config, processing_class)
            )
        eval_rows: Any
        if isinstance(eval_dataset, Mapping):
            eval_rows = {name: tokenized(rows, f"eval_dataset {name!r}: ") for name, rows in eval_dataset.items()}
        else:
            eval_rows = tokenized(eval_dataset, "eval_dataset: ")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=tokenized(train_dataset),
            eval_dataset=eval_rows,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(f"fsdp={args.fsdp!r}: accelerate shards over GPUs, and there are none: leave it out")
        _keep_float32_outputs(self.accelerator)
        self.model_accepts_loss_kwargs = True  # what `loss_is_scaled_for_ga` is called before transformers 5.19
        self._train_means, self._eval_means = PairMeans(), PairMeans()
        self._finite_guard = FiniteGuard(self.accelerator.gather)
        self.add_callback(self._finite_guard)

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, PackedPairs):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[PackedPairs], device: torch.device) -> Tensor | None:
        """Pairs of one optimizer step, over all micro-batches and processes."""
        if not batch_samples:
            return None
        pairs = torch.tensor(sum(len(batch) for batch in batch_samples), device=device)
        return self.accelerator.gather(pairs).sum() if self.args.world_size > 1 else pairs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedPairs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss of the pairs, or their share of the mean over the whole optimizer step."""
        output: QAdapterOutput = model(inputs)
        assert output.loss is not None and output.metrics is not None
        loss = output.loss
        if model.training:
            self._train_means.add(output.metrics)
            self._finite_guard.add(loss, inputs.sources)
        if num_items_in_batch is not None:
            loss = loss * (len(inputs) * self.accelerator.num_processes / num_items_in_batch)
        return (loss, output) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`.

        Raises:
            NonFiniteLossError: at the first loss or gradient that is NaN or infinite, before the optimizer steps.
            ValueError: the checkpoint to resume from was trained with other hyper-parameters.
        """
        self._train_means.clear()
        self._check_resumed(resume_from_checkpoint)
        self._cache_base()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_resumed(self, checkpoint: str | bool | None) -> None:
        """Before any work, and here because DeepSpeed resumes past Trainer's own method."""
        folder = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        if not folder:
            return
        sidecar = adapter_folder(folder, self.model.active_adapter) / CONFIG_NAME
        if sidecar.is_file():
            found, wanted = read_sidecar(sidecar)[0].to_dict(), self.model.qadapter_config.to_dict()
            changed = [f"{name}={found[name]!r}, not {wanted[name]!r}" for name in found if found[name] != wanted[name]]
            if changed:
                raise ValueError(
                    f"{folder} was trained with {'; '.join(changed)}: resume with the same, or start in another "
                    "output_dir"
                )

    def _cache_base(self) -> None:
        """Let the training rows bring what the base says of them. Before any sharding of the model."""
        rows: Any = self.train_dataset
        folder = self.args.cache_base
        if folder is None or not isinstance(rows, TokenizedRows):
            return
        longest = max(map(longest_branch, rows))
        if self.args.max_length is not None and longest > self.args.max_length:
            raise ValueError(
                f"cache_base={folder!r}: train_dataset has rows of {longest} tokens, which max_length="
                f"{self.args.max_length} would cut: tokenise them with that, or raise it"
            )
        if self.model.device.type == "cpu" and self.args.device.type != "cpu":
            raise ValueError(
                f"cache_base={folder!r}: a base that is sharded waits on the CPU, which is slow; fill the folder by a "
                "run of one step on GPUs that hold the base whole, or leave the option out"
            )
        failure: Exception | None = None
        try:
            with self.accelerator.autocast():
                cached = cached_rows(
                    self.model,
                    rows,
                    Path(folder),
                    pad_action=getattr(self.data_collator, "pad_action", None),
                    precision=self.accelerator.mixed_precision,
                    process=self.accelerator.process_index,
                    processes=self.accelerator.num_processes,
                )
        except (OSError, ValueError) as error:
            failure = error
        failed = self.accelerator.gather(torch.tensor([failure is not None], device=self.args.device)).any()
        if failure is not None:
            raise failure
        if failed:
            raise OSError(f"cache_base={folder!r}: another process could not do its part; its message says why")
        if missing := cached.missing():
            raise OSError(f"cache_base={folder!r}: {missing[0]} is not there: name a folder that all processes share")
        self.train_dataset: Any = cached  # which Trainer takes as it takes any dataset

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's `save_model`.

        Raises:
            NonFiniteLossError: a trained weight is NaN or infinite; nothing is written.
        """
        check_finite_weights(self.model, output_dir or str(self.args.output_dir))
        super().save_model(output_dir, _internal_call)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: PackedPairs,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        # `gather_for_metrics` leaves out the rows that were repeated to give every process as many.
        values = self.accelerator.gather_for_metrics(torch.stack(list(output.metrics.values()), dim=1))
        self._eval_means.add(dict(zip(output.metrics, values.unbind(dim=1), strict=True)))
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop; the metrics, the loss among them, are exact means over pairs."""
        self._eval_means.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_means.pop(lambda tensor: tensor)
        means["loss"] = means["pref_loss"] + self.model.qadapter_config.beta * means["chi2_loss"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**self._train_means.pop(self.accelerator.gather), **logs}
        super().log(logs, start_time)


def _check_unused(ref_model: Any, compute_metrics: Any) -> None:
    if ref_model is not None:
        raise ValueError("ref_model is given: the reference is the base model with its adapters off; leave it out")
    if compute_metrics is not None:
        raise ValueError(
            "compute_metrics is given, but no predictions are made: read the logged metrics, or use a callback"
        )


def _check_vocabulary(model: QAdapterModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_base_model().get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}: give the model's tokenizer"
        )


def _keep_float32_outputs(accelerator: Any) -> None:
    """With FSDP2 and bf16 accelerate lets the model's outputs be rounded: to 0.69141 where the loss is 0.69315."""
    policy: Any = getattr(getattr(accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=torch.float32)


def _use_one_gpu(args: QAdapterTrainingArguments) -> None:
    """Packed batches are not split over the GPUs of one process (DataParallel)."""
    if args.n_gpu > 1:
        logger.info("training on one of %d GPUs; `accelerate launch` uses them all", args.n_gpu)
        args._n_gpu = 1


def _as_qadapter_model(
    model: PreTrainedModel | QAdapterModel | str,
    config: QAdapterConfig | None,
    peft_config: PeftConfig | None,
    quantization_config: Any,
) -> QAdapterModel:
    if quantization_config is not None:
        if not isinstance(model, str):
            raise ValueError("quantization_config is for a model given by name: quantise the model when you load it")
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto", quantization_config=quantization_config)
    if isinstance(model, QAdapterModel):
        if config is not None or peft_config is not None:
            raise ValueError("the model is a QAdapterModel already: leave out peft_config and qadapter_config")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("the adapter is frozen: load it with from_pretrained(..., is_trainable=True) to train on")
        return model
    if isinstance(model, PeftModel):
        raise ValueError(f"model is a plain {type(model).__name__}; give its base model, or a QAdapterModel")
    return get_qadapter_model(model, config, peft_config)


def _pad_action(config: QAdapterConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token scored after the last one, which the `reference` preset alone asks for."""
    if config.scored_states != "shifted":
        return None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ValueError("preset='reference' scores a step to padding, but the tokenizer has no pad or EOS token")
    return pad


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
