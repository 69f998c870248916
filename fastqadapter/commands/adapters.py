"""Trained adapters on the command line: `FOLDER`, `FOLDER=WEIGHT`, `NAME=FOLDER`, and the base model that they name."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from fastqadapter.commands.arguments import ModelArguments, load_model_and_tokenizer
from fastqadapter.commands.parsing import ArgumentError
from fastqadapter.config import CONFIG_NAME
from fastqadapter.models import QAdapterModel


@dataclasses.dataclass
class BaseArguments(ModelArguments):
    """As in training, but the adapter knows its base."""

    model_name_or_path: str | None = dataclasses.field(  # type: ignore[assignment]
        default=None, metadata={"help": "folder or hub id of the base model; default: what the adapter names"}
    )


def load_adapters(
    folders: Mapping[str, str], base_arguments: BaseArguments, *, force: bool = False
) -> tuple[QAdapterModel, PreTrainedTokenizerBase]:
    """The base model with all adapters on it, by name, and its tokenizer."""
    first, *others = folders
    if base_arguments.model_name_or_path is None:
        base_arguments.model_name_or_path = base_of(folders[first])
    base, tokenizer = load_model_and_tokenizer(base_arguments)
    model = QAdapterModel.from_pretrained(base, folders[first], first, force=force)
    for name in others:
        model.load_adapter(folders[name], name, force=force)
    return model, tokenizer


def name_adapters(arguments: list[str]) -> tuple[dict[str, str], dict[str, float]]:
    """Folders and weights by name: `NAME=FOLDER`, or a folder alone under the first free name of "default",
    "adapter1", ...; each may end in `=WEIGHT`."""
    folders: dict[str, str] = {}
    weights: dict[str, float] = {}
    taken = {argument.partition("=")[0] for argument in arguments}
    for index, argument in enumerate(arguments):
        named_folder, weight = _split_weight(argument)
        name, equals, folder = named_folder.partition("=")
        if folder and not name.isidentifier() and Path(folder).exists() and not Path(named_folder).exists():
            raise ArgumentError(
                f"adapter={argument!r}: {name!r} is no name for an adapter: letters, digits and _ alone"
            )
        if not equals or (folder and not name.isidentifier()) or Path(named_folder).exists():
            folder = named_folder
            names = itertools.chain(["default"] if index == 0 else [], (f"adapter{n}" for n in itertools.count(1)))
            name = next(each for each in names if each not in taken and each not in folders)
        if not folder:
            raise ArgumentError(
                f"adapter={argument!r} names no folder: give FOLDER, FOLDER=WEIGHT or NAME=FOLDER=WEIGHT"
            )
        if name in folders:
            raise ArgumentError(f"adapter={arguments}: {name!r} names two of them; give each a name of its own")
        folders[name], weights[name] = folder, weight
    return folders, weights


def _split_weight(argument: str) -> tuple[str, float]:
    """What stands before `=WEIGHT`, and the weight; 1 where there is none, as where all of it is a folder."""
    named_folder, equals, last = argument.rpartition("=")
    if not equals or Path(argument).exists() or Path(argument.partition("=")[2]).exists():
        return argument, 1.0
    try:
        return named_folder, float(last)
    except ValueError:
        if Path(named_folder, CONFIG_NAME).exists():
            raise ArgumentError(f"adapter={argument!r}: the weight {last!r} is no number") from None
        return argument, 1.0


def base_of(folder: str) -> str:
    """The base model that an adapter names."""
    try:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArgumentError(f"adapter={folder!r} is no folder or hub id of a trained adapter: {reason}") from None
    if not base:
        raise ArgumentError(f"adapter={folder!r} does not name its base model: give --model_name_or_path")
    return base
