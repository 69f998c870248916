"""`QAdapterModel`: a PEFT model whose adapter is the residual Q-function of a preference."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModelForCausalLM,
    TaskType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from fastqadapter.config import KVMode, QAdapterConfig, write_sidecar
from fastqadapter.loss import q_adapter_loss
from fastqadapter.models import base
from fastqadapter.models.card import write_card
from fastqadapter.models.dials import Dials, Weight, dials_of
from fastqadapter.models.loading import (
    HUB_ARGUMENTS,
    adapter_folder,
    check_complete,
    check_finite,
    hub_arguments,
    read_adapter_folder,
    weight_errors,
)
from fastqadapter.models.peft_configs import checked_peft_config
from fastqadapter.models.policy import Policy, check_assistant, check_uncached_input, customised
from fastqadapter.models.sharded import gathered_head
from fastqadapter.models.streams import TwoStreams, check_servable, lock_of
from fastqadapter.packing import PackedPairs

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class QAdapterOutput(ModelOutput):
    """Loss of a packed batch (a scalar, mean over pairs) and its metrics, (B,) each and detached."""

    loss: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class QAdapterModel(PeftModelForCausalLM):
    """A frozen causal LM with Q-Adapters on it.

    `model(batch)` gives the preference loss of packed pairs, `model(input_ids=...)` the logits of the customised
    policy, `model.generate(...)` transformers' own generation from it. Never the plain adapter's logits: those are
    Q-values, not a policy. Saving, loading, adding and switching adapters are PEFT's. The base is used as it is, but
    for its dropout, which is off in training mode too.

    Made by `get_qadapter_model` or `QAdapterModel.from_pretrained`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        *,
        qadapter_config: QAdapterConfig | None = None,
        **kwargs: Any,
    ):
        config = QAdapterConfig() if qadapter_config is None else qadapter_config
        for name, given, wanted in (("config", config, QAdapterConfig), ("peft_config", peft_config, PeftConfig)):
            if not isinstance(given, wanted):
                raise ValueError(f"{name} is a {type(given).__name__}; give a {wanted.__name__}")
        base.check_bare(model)
        decoder = base.decoder_of(model)
        base.check_packable(model, decoder)
        base.heed_attention_softcap(model)
        base.check_lm_head(model, decoder, base.lm_head_of(model))
        check_servable(model, config.kv_mode)
        identity = base.fingerprint(model)
        peft_config = checked_peft_config(model, peft_config, config.kv_mode)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(model, peft_config, adapter_name, **kwargs)
        try:
            base.check_targets(model, config.kv_mode)
        except ValueError:
            self.base_model.unload()  # leave the user's model as it was
            for parameter in trainable:
                parameter.requires_grad_(True)
            raise
        self.base_identity = identity
        self.qadapter_configs = {adapter_name: config}
        self._adapters_are_off = False
        base.silence_own_dropout(decoder)
        self.streams = TwoStreams(model, config.kv_mode)
        self.train(self.training)

    @property
    def qadapter_config(self) -> QAdapterConfig:
        """Config of the active adapter."""
        return self.qadapter_configs[self.active_adapter]

    def forward(
        self,
        batch: PackedPairs | Tensor | None = None,
        *,
        alpha_0: float | None = None,
        alpha_tilde: float | None = None,
        adapters: Mapping[str, Weight] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Packed pairs -> `QAdapterOutput(loss, metrics)`; `input_ids=...` -> logits of the customised policy.

        Args:
            batch: `PackedPairs` of the `PreferenceCollator`, on the device of the model; or `input_ids` (B, L).
            alpha_0, alpha_tilde, adapters: of the policy, as in `generate`; the loss has those of the config.
            **kwargs: for logits, the arguments of the base model's own forward, without `labels`,
                `output_hidden_states` and `output_attentions`; in `prompt` mode `logits_to_keep` must say where the
                prompt ends.

        Raises:
            ValueError: dials beside packed pairs, an unknown adapter, or a number outside its range.
        """
        if isinstance(batch, PackedPairs):
            if (alpha_0, alpha_tilde, adapters) != (None, None, None):
                raise ValueError(
                    "alpha_0, alpha_tilde and adapters go with input_ids; the loss has those of the config"
                )
            return self._preference_loss(batch)
        if batch is not None:
            kwargs["input_ids"] = batch
        model = self.get_base_model()
        with lock_of(self.streams.decoder), customised(model, self._policy(alpha_0, alpha_tilde, adapters)):
            return model(**kwargs)

    def train(self, mode: bool = True) -> QAdapterModel:
        """Training mode for the adapter; the frozen base never runs with dropout."""
        super().train(mode)
        if mode and hasattr(self, "streams"):
            for module in self.streams.frozen_modules:
                module.training = False
        return self

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """PEFT's `disable_adapter`: inside it this is the base model, `generate` and logits alike."""
        before, self._adapters_are_off = self._adapters_are_off, True
        try:
            with super().disable_adapter():
                yield
        finally:
            self._adapters_are_off = before

    def _preference_loss(self, batch: PackedPairs) -> QAdapterOutput:
        if self._adapters_are_off:
            raise ValueError("the loss of packed pairs needs the adapter: call the model outside of disable_adapter()")
        model = self.get_base_model()
        hidden_q, hidden_b = self.hidden_states(batch)
        with gathered_head(model, hidden_b) as head:
            loss, metrics = q_adapter_loss(hidden_q, hidden_b, head, batch, self.qadapter_config)
        return QAdapterOutput(loss=loss, metrics=metrics)

    def hidden_states(self, batch: PackedPairs) -> tuple[Tensor, Tensor]:
        """Last hidden states at the state rows of a packed batch: `h_q` (S, D) of the active adapter, `h_b` (S, D)."""
        with lock_of(self.streams.decoder):
            return self.streams.packed_hidden_states(batch, self.active_adapter)

    def generate(
        self,
        *args: Any,
        alpha_0: float | None = None,
        alpha_tilde: float | None = None,
        adapters: Mapping[str, Weight] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, with the customised policy `softmax((q + alpha_0 log pi) / alpha_tilde)`.

        Args:
            alpha_0: weight of the base policy; default: that of the adapter's config, of the active one's in a mixture.
            alpha_tilde: temperature of the customised policy; default: the same.
            adapters: weight of each loaded adapter, any real number; `q = sum_i w_i q_i`. With a `logits` head 0 or 1.
                Without any (all 0) and with equal alphas it is the base policy. Default: the active adapter with
                weight 1.
            *args, **kwargs: what the base model's `generate` takes, but what needs one stream (hidden states,
                attentions, caches of other kinds than dynamic and static; docs/limits.md).

        Raises:
            ValueError: an unknown adapter, or a number outside its range.
        """
        model = self.get_base_model()
        check_uncached_input(*args[:1], **kwargs)
        check_assistant(model, **kwargs)
        if "generation_config" in self.__dict__:  # set on us and not on the base; PEFT passes it on too
            model.generation_config = self.generation_config
        with lock_of(self.streams.decoder), customised(model, self._policy(alpha_0, alpha_tilde, adapters)):
            return model.generate(*args, **kwargs)

    def _policy(
        self, alpha_0: float | None, alpha_tilde: float | None, adapters: Mapping[str, Weight] | None
    ) -> Policy:
        return Policy(self.get_base_model(), self.streams, self.dials(alpha_0, alpha_tilde, adapters))

    def dials(
        self,
        alpha_0: float | None = None,
        alpha_tilde: float | None = None,
        adapters: Mapping[str, Weight] | None = None,
    ) -> Dials:
        """What `generate` makes of them: the config's alphas where none are given, no adapter of weight 0."""
        if self._adapters_are_off or self.streams.adapters_are_disabled():
            return Dials(alpha_0=1.0, alpha_tilde=1.0, weights={})
        return dials_of(self.qadapter_configs, self.active_adapter, alpha_0, alpha_tilde, adapters)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `add_adapter` with our checks; the new adapter has the config of the active one until loaded."""
        model = self.get_base_model()
        kv_mode = self.streams.kv_mode
        peft_config = checked_peft_config(model, peft_config, kv_mode)
        result = super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        try:
            base.check_targets(model, kv_mode)
        except ValueError:
            self.delete_adapter(adapter_name)
            raise
        self.qadapter_configs.setdefault(adapter_name, self.qadapter_config)
        self.streams.refresh()
        return result

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, force: bool = False, **kwargs: Any
    ) -> Any:
        """PEFT's `load_adapter`: load a further Q-Adapter, or the weights of a known one.

        Raises:
            ValueError: no sidecar (a plain LoRA adapter), no safetensors, trained on another base model (unless
                `force`), or in another KV mode than the adapters here.
        """
        config = read_adapter_folder(model_id, self.base_identity, force, hub_arguments(kwargs))
        if config.kv_mode != self.streams.kv_mode:
            raise ValueError(
                f"adapter {str(model_id)!r} was trained with kv_mode={config.kv_mode!r}, this model runs "
                f"kv_mode={self.streams.kv_mode!r}; load it on a base model of its own"
            )
        known = adapter_name in self.peft_config
        before = get_peft_model_state_dict(self, adapter_name=adapter_name) if known else {}
        before = {name: weight.clone() for name, weight in before.items()}
        try:
            with weight_errors(model_id):
                result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
                check_complete(result, model_id, adapter_name)
                check_finite(self, str(model_id), adapter_name)
        except Exception:
            if known:
                set_peft_model_state_dict(self, before, adapter_name=adapter_name)
            elif adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise
        self.qadapter_configs[adapter_name] = config
        self.streams.refresh()
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's `delete_adapter`; layers that no adapter is left on are the base's own again."""
        if list(self.peft_config) == [adapter_name]:
            raise ValueError(f"{adapter_name!r} is the only adapter; for the base policy use adapters={{}}")
        super().delete_adapter(adapter_name)
        base.unwrap_bare_layers(self.get_base_model())
        self.qadapter_configs.pop(adapter_name, None)
        self.streams.refresh()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """PEFT's `save_pretrained`, with the sidecar `qadapter_config.json` beside each adapter's files."""
        if kwargs.get("safe_serialization") is False or (args and args[0] is False):
            raise ValueError("safe_serialization=False would write a pickle; adapters are saved as safetensors only")
        super().save_pretrained(str(save_directory), *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        for name in kwargs.get("selected_adapters") or self.peft_config:
            write_sidecar(adapter_folder(save_directory, name), self.qadapter_configs[name], self.base_identity)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """What `save_pretrained` writes as README.md: how to use the active adapter, and how it was trained.

        A card that cannot be read or written is left alone, with a warning: the weights are saved after it.
        """
        name = self.active_adapter
        place = adapter_folder(".", name).as_posix()
        base_name = str(self.get_base_model().config.name_or_path)
        try:
            write_card(Path(output_dir), place, base_name, self.qadapter_configs[name], self.peft_config[name])
        except Exception as error:  # what YAML and the hub's library raise is theirs
            logger.warning("%s/README.md is left as it is: %s", output_dir, " ".join(str(error).split())[:200])

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | str,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        kv_mode: KVMode | None = None,
        force: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> QAdapterModel:
        """Load a Q-Adapter that `save_pretrained` wrote onto its base model.

        Args:
            model: the base model, or its folder or hub id.
            model_id: folder or hub id of the adapter.
            adapter_name: name to load it under.
            is_trainable: keep training it; else it is frozen.
            kv_mode: the mode to run in, which must be the one it was trained in, unless `force`.
            force: load it although base model or KV mode differ from those it was trained with.
            **kwargs: hub arguments (`revision`, `token`, `subfolder`, `cache_dir`, `local_files_only`,
                `force_download`), and PEFT's `low_cpu_mem_usage`.

        Raises:
            ValueError: no sidecar (a plain LoRA adapter), no safetensors, another base model or KV mode.
        """
        unknown = sorted(set(kwargs) - {*HUB_ARGUMENTS, "low_cpu_mem_usage"})
        if unknown:
            raise ValueError(
                f"unknown arguments {unknown}; dtype and device are the base's: load it yourself and pass it"
            )
        model = _load_base(model)
        hub = hub_arguments(kwargs)
        config = read_adapter_folder(model_id, base.fingerprint(model), force, hub)
        if kv_mode is not None and kv_mode != config.kv_mode:
            if not force:
                raise ValueError(
                    f"adapter {str(model_id)!r} was trained with kv_mode={config.kv_mode!r} and is another function "
                    f"with kv_mode={kv_mode!r}; leave kv_mode out, or pass force=True"
                )
            config = dataclasses.replace(config, kv_mode=kv_mode)
        peft_config = PeftConfig.from_pretrained(str(model_id), **hub)
        peft_config.inference_mode = not is_trainable
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loaded = cls(
            model,
            peft_config,
            adapter_name,
            qadapter_config=config,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        # Base and mode are checked above; PEFT's own method fills the weights in.
        try:
            with weight_errors(model_id):
                result = super(QAdapterModel, loaded).load_adapter(
                    str(model_id),
                    adapter_name,
                    is_trainable=is_trainable,
                    torch_device=str(base.lm_head_of(model).weight.device),
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    **kwargs,
                )
                check_complete(result, model_id, adapter_name)
                check_finite(loaded, str(model_id), adapter_name)
        except Exception:
            loaded.base_model.unload()
            for parameter in trainable:
                parameter.requires_grad_(True)
            raise
        return loaded if is_trainable else loaded.eval()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the policy needs base and Q stream apart.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a Q-Adapter cannot be merged into its base: the customised policy needs both streams, and the merged "
            "weights alone would sample from the Q-values; keep the adapter and use generate()"
        )

    merge_adapter = merge_and_unload

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' continuous batching runs the base's forward in a loop of its own.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching would sample from the plain adapter, that is from the Q-values: use generate(), whose "
            "`adapters` take one weight for each row of a batch"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a mixture of weights is no mixture of Q-functions.

        Raises:
            ValueError: always.
        """
        raise ValueError("add_weighted_adapter mixes weights; residual Q-functions add, at generation: adapters={...}")


def get_qadapter_model(
    base_model: PreTrainedModel | str,
    config: QAdapterConfig | None = None,
    peft_config: PeftConfig | None = None,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> QAdapterModel:
    """Put a new, trainable Q-Adapter on a causal LM, which is frozen.

    Args:
        base_model: any causal LM of transformers that uses its attention interface, or its folder or hub id.
        config: hyper-parameters; default `QAdapterConfig()`.
        peft_config: a `LoraConfig`; default rank 8, `lora_alpha` 16. Without `target_modules` it targets all linear
            layers of the decoder, but not k and v in `shared` mode.
        adapter_name: name of the adapter.
        autocast_adapter_dtype: keep the weights of the adapter in float32 on a half-precision base.

    Raises:
        ValueError: an architecture that cannot be served, or a target that the method or the KV mode forbids.
    """
    peft_config = LoraConfig(lora_alpha=16, task_type=TaskType.CAUSAL_LM) if peft_config is None else peft_config
    return QAdapterModel(
        _load_base(base_model),
        peft_config,
        adapter_name,
        qadapter_config=config,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )


def _load_base(model: PreTrainedModel | str) -> PreTrainedModel:
    if isinstance(model, str | os.PathLike):
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return model
