"""The folder that vLLM serves: a base model by reference, its adapters, and what says so in config.json."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoModelForCausalLM

from fastqadapter.config import CONFIG_NAME
from fastqadapter.integrations.vllm import served_architecture
from fastqadapter.integrations.vllm.served import KEY, Served, ServedAdapter, check_name
from fastqadapter.integrations.vllm.weights import ADAPTERS, read_adapter
from fastqadapter.models import QAdapterModel
from fastqadapter.models.base import lm_head_of

logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)
# config.json is written anew; by the others vLLM would take the folder for one in Mistral's own format.
OTHER_FORMAT = re.compile(r"config\.json|params\.json|consolidated.*\.safetensors.*")
UNSERVABLE = {
    "final_logit_softcapping": "a soft-cap behind its LM head",
    "kv_lora_rank": "multi-head latent attention",
    "num_local_experts": "experts",
    "num_experts": "experts",
    "n_routed_experts": "experts",
}
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # beside safetensors of the same


def export_for_vllm(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    output: str | Path,
    *,
    max_adapters: int = 1,
    copy: bool = False,
) -> Path:
    """Write a folder for `vllm serve` or `vllm.LLM`.

    The base is loaded once, to check that the adapters belong to it.

    Args:
        base: folder or hub id of the base model, with weights as safetensors.
        adapters: name -> folder or hub id of a Q-Adapter. The first is what a request gets that names none.
        output: made, or replaced where it holds an earlier export.
        max_adapters: how many one request may mix; each costs a row more in attention for all.
        copy: copy the base's files instead of linking to them, for a folder that will be moved.

    Raises:
        ValueError: an adapter of another base or mode, or that vLLM cannot serve; an output folder with other things.
    """
    output = Path(output).resolve()
    if not adapters:
        raise ValueError("no adapter given")
    for name in adapters:
        check_name(name)
    if not 1 <= max_adapters <= len(adapters):
        raise ValueError(
            f"max_adapters={max_adapters} is outside its legal range [1, {len(adapters)}]: so many are given"
        )
    if output.exists() and not _is_export(output) and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} holds something else than an earlier export: name another folder")
    source = _folder(base, None)
    files = _base_files(source)  # before the weights are loaded: a mistake in them shows at once
    folders = {name: _folder(path, list(ADAPTER_FILES)) for name, path in adapters.items()}
    for folder in (source, *folders.values()):
        _check_apart(output, folder)
    for folder in folders.values():
        read_adapter(folder)
    config, served = _checked(source, str(base), folders, max_adapters)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{output.name}-", dir=output.parent
    ) as scratch:  # where a rename is one step
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        _write(new, files, folders, {**config, KEY: served.to_dict()}, copy)
        if output.exists():
            output.replace(old)
        new.replace(output)
    return output


def _write(
    target: Path, files: Sequence[Path], folders: Mapping[str, Path], config: Mapping[str, object], copy: bool
) -> None:
    target.mkdir()
    for file in files:
        if copy:
            shutil.copyfile(file, target / file.name)
        else:
            os.symlink(file.resolve(), target / file.name)
    for name, folder in folders.items():
        (target / ADAPTERS / name).mkdir(parents=True)
        for file_name in ADAPTER_FILES:
            shutil.copyfile(folder / file_name, target / ADAPTERS / name / file_name)
    content = {**config, "architectures": [_architecture(config)]}
    (target / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_apart(output: Path, source: Path) -> None:
    """Raise a ValueError where writing the one would touch the other."""
    one, other = output.resolve(), source.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"{output}: the export cannot lie in, hold or be what it is made of ({source})")


def _is_export(folder: Path) -> bool:
    try:
        return KEY in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _folder(name: str | Path, patterns: list[str] | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (OSError, HFValidationError, RepositoryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: neither a local folder nor a hub repository within reach ({reason})") from None


def _base_files(source: Path) -> list[Path]:
    files = [file for file in sorted(source.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{source}: no weights as safetensors; load and save the model with transformers first")
    if not any(file.name.startswith("tokenizer") for file in files):
        logger.warning("%s has no tokenizer: vLLM will need --tokenizer", source)
    return [file for file in files if not OTHER_FORMAT.fullmatch(file.name) and file.suffix not in OTHER_WEIGHTS]


def _architecture(config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ValueError("the base model's config.json names no architecture")
    return served_architecture(str(names[0]))


def _checked(
    source: Path, base: str, folders: Mapping[str, Path], max_adapters: int
) -> tuple[dict[str, object], Served]:
    """config.json of the base, and what is served; loading is what checks most."""
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{source}: config.json is missing: no model of transformers")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no config of a model")
    _architecture(config)
    if KEY in config:
        raise ValueError(f"{source} is an export itself: name its base, {config[KEY].get('base')!r}")
    for key, reason in UNSERVABLE.items():
        if config.get(key):
            raise ValueError(f"{source}: vLLM cannot serve a Q-Adapter on a model with {reason} ({key} in config.json)")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    [first, *others] = folders
    wrapped = QAdapterModel.from_pretrained(model, folders[first], adapter_name=first)
    for name in others:
        wrapped.load_adapter(folders[name], name)
    configs = {name: wrapped.qadapter_configs[name] for name in folders}
    kv_mode = configs[first].kv_mode
    if kv_mode == "prompt":
        raise ValueError(
            f"adapter {first!r} was trained with kv_mode='prompt', which vLLM cannot serve; it can 'shared' and "
            "'separate'"
        )
    if kv_mode == "separate" and max_adapters > 1:
        raise ValueError("max_adapters: with kv_mode='separate' a request can use one adapter")
    head = lm_head_of(model)
    if head.bias is not None:
        raise ValueError(f"{source}: vLLM cannot serve a Q-Adapter on a model with a bias in its LM head")
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        raise ValueError(f"{source}: vLLM cannot serve a Q-Adapter on a model with attention sinks")
    served = {
        name: ServedAdapter(each.alpha_0, each.alpha_tilde, each.q_head or "difference")
        for name, each in configs.items()
    }
    return config, Served(base, kv_mode, served, max_adapters, head.logit_scale)
