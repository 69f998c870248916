"""Reading a saved Q-Adapter: its files, what must be in them, and errors of one line where it is not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import nn

from fastqadapter.config import CONFIG_NAME, QAdapterConfig, read_sidecar
from fastqadapter.models import base

HUB_ARGUMENTS = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download")


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def adapter_folder(root: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where PEFT saves an adapter: "default" in the folder itself, others in one of their own below it."""
    return Path(root) if adapter_name == "default" else Path(root) / adapter_name


def read_adapter_folder(
    model_id: str | os.PathLike[str], identity: dict[str, Any], force: bool, hub: dict[str, Any]
) -> QAdapterConfig:
    """Config of a saved adapter, checked against the base model it shall run on."""
    _locate(model_id, SAFETENSORS_WEIGHTS_NAME, "weights as safetensors", hub)
    config, trained_on = read_sidecar(_locate(model_id, CONFIG_NAME, "the Q-Adapter sidecar", hub))
    if not force:
        base.check_same_base(trained_on, identity, str(model_id))
    return config


@contextlib.contextmanager
def weight_errors(model_id: str | os.PathLike[str]) -> Iterator[None]:
    """What a broken weight file raises, as a ValueError of one line."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{model_id}: its weights cannot be loaded: {reason}") from error


def check_complete(load_result: Any, model_id: str | os.PathLike[str], adapter_name: str) -> None:
    """Raise a ValueError if weights were missing or left over: the adapter would be random in part."""
    # PEFT looks for the name anywhere in the key, and reports other adapters' weights too.
    missing = [key for key in load_result.missing_keys if adapter_name in key.split(".")[-2:]]
    for problem, names in (("misses", missing), ("has unknown", load_result.unexpected_keys)):
        if names:
            raise ValueError(f"{model_id}: the weight file {problem} {len(names)} weights, {names[0]!r} for one")


def _locate(model_id: str | os.PathLike[str], filename: str, what: str, hub: dict[str, Any]) -> str:
    """Path of one file of a local folder or a hub repository."""
    folder = Path(model_id) / hub.get("subfolder", "")
    if (folder / filename).is_file():
        return str(folder / filename)
    hint = "a plain LoRA adapter is no Q-Adapter; train one with fastqadapter"
    if folder.is_dir():
        raise ValueError(f"{folder}: {what} ({filename}) is missing: {hint}")
    try:
        return hf_hub_download(str(model_id), filename, **hub)
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(f"{model_id}: {what} ({filename}) is missing: {hint}") from None
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model_id}: neither a local folder nor a hub repository within reach ({reason})") from None


def check_finite(model: nn.Module, source: str, adapter_name: str) -> None:
    """Raise a ValueError if a weight of the adapter is NaN or infinite: every logit would be."""
    name = first_not_finite(model, adapter_name)
    if name is not None:
        raise ValueError(f"{source}: weight {name!r} is not finite; the run that made it diverged")


def first_not_finite(model: nn.Module, adapter_name: str) -> str | None:
    """Name of the first weight of the adapter with a NaN or an infinity; None if there is none."""
    for name, parameter in model.named_parameters():
        own = "lora_" in name and adapter_name in name.split(".")[-2:]
        if own and not bool(parameter.isfinite().all()):
            return name
    return None
