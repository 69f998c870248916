"""The folder that vLLM serves: a base model by reference, its adapters, and what says so in config.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoModelForCausalLM

from fastqadapter.config import CONFIG_NAME
from fastqadapter.integrations.vllm import served_architecture
from fastqadapter.integrations.vllm.served import KEY, Served, ServedAdapter
from fastqadapter.integrations.vllm.weights import ADAPTERS, read_adapter
from fastqadapter.models import QAdapterModel
from fastqadapter.models.base import lm_head_of

ADAPTER_FILES = ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)
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
    output = Path(output)
    if not adapters:
        raise ValueError("no adapter given")
    for name in adapters:
        if not name or set(name) & set("/\\=,:") or name.startswith("."):
            raise ValueError(f"adapter name {name!r}: use letters, digits, '-', '_' and '.' within")
    if max_adapters < 1:
        raise ValueError(f"max_adapters={max_adapters} is outside its legal range [1, inf)")
    if output.exists() and not _is_export(output) and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} holds something else than an earlier export: name another folder")
    source = _folder(base, None)
    files = _base_files(source)  # before the weights are loaded: a mistake in them shows at once
    folders = {name: _folder(path, list(ADAPTER_FILES)) for name, path in adapters.items()}
    for folder in folders.values():
        read_adapter(folder)
    config, served = _checked(source, str(base), folders, max_adapters)
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in files:
        if copy:
            shutil.copyfile(file, part / file.name)
        else:
            os.symlink(file.resolve(), part / file.name)
    for name, folder in folders.items():
        (part / ADAPTERS / name).mkdir(parents=True)
        for file_name in ADAPTER_FILES:
            shutil.copyfile(folder / file_name, part / ADAPTERS / name / file_name)
    content = {**config, "architectures": [_architecture(config)], KEY: served.to_dict()}
    (part / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        shutil.rmtree(output)
    part.replace(output)
    return output


def _is_export(folder: Path) -> bool:
    try:
        return KEY in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
    return [file for file in files if file.name != "config.json" and file.suffix not in OTHER_WEIGHTS]


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
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("final_logit_softcapping"):
        raise ValueError(f"{_architecture(config)}: its soft-cap behind the LM head cannot be served by vLLM")
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
    served = {
        name: ServedAdapter(each.alpha_0, each.alpha_tilde, each.q_head or "difference")
        for name, each in configs.items()
    }
    return config, Served(base, kv_mode, served, max_adapters, head.logit_scale)
