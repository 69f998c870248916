"""What several subcommands share: one-line argument errors, YAML configs, loading models by TRL's flag names."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fastqadapter.commands.parsing import NEGATIVE_NUMBER, ArgumentError, OneLineParser
from fastqadapter.data import read_rows
from fastqadapter.rows import OnBadRow

DTYPES = ("auto", "bfloat16", "float16", "float32")


class OneLineHfParser(HfArgumentParser):
    """transformers' dataclass parser without the page of usage before an error, and with YAML defaults."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message} (--help lists the options)")

    def format_help(self) -> str:
        config = "  --config FILE.yaml    any of these options as `option: value` lines; the command line wins\n"
        return super().format_help() + "\n" + config

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """Dataclasses from `--config file.yaml` (defaults) and the command line (which wins).

        Raises:
            ValueError: an unreadable file, or an option that does not exist.
        """
        self._negative_number_matcher = NEGATIVE_NUMBER
        finder = OneLineParser(add_help=False)
        finder.add_argument("--config")
        found, rest = finder.parse_known_args(argv)
        if found.config is not None:
            rest = _yaml_arguments(found.config, rest) + rest
        *parsed, unknown = self.parse_args_into_dataclasses(
            rest, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            raise ArgumentError(f"unknown arguments {' '.join(unknown)} (--help lists the options)")
        return tuple(parsed)


def _yaml_arguments(path: str, command_line: list[str]) -> list[str]:
    """The entries of a YAML file as command-line arguments, so both are checked alike; those that the command line
    has too are left out."""
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict):
        raise ArgumentError(f"{path}: expected 'option: value' lines, got a {type(entries).__name__}")
    arguments = []
    for name, value in entries.items():
        if value is None or any(given.partition("=")[0] == f"--{name}" for given in command_line):
            continue
        if value is False and str(name).endswith("_strategy"):
            value = "no"  # what YAML makes of an unquoted no
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    return arguments


@dataclasses.dataclass
class ModelArguments:
    """Which base model, with TRL's flag names."""

    model_name_or_path: str = dataclasses.field(metadata={"help": "folder or hub id of the base model"})
    model_revision: str = dataclasses.field(default="main", metadata={"help": "branch, tag or commit on the hub"})
    dtype: str = dataclasses.field(
        default="auto", metadata={"help": f"dtype of the base model: {', '.join(DTYPES)}", "choices": DTYPES}
    )
    attn_implementation: str | None = dataclasses.field(
        default=None, metadata={"help": "attention of generation: eager, sdpa, flash_attention_2, ..."}
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "run the model repository's own Python code"}
    )


def load_model_and_tokenizer(
    arguments: ModelArguments, *, on_gpu: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, on a GPU where there is one and `on_gpu`, and its tokenizer."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # "Loading weights" is for eyes, not for log files
    name = arguments.model_name_or_path
    hub = {"revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=arguments.dtype, attn_implementation=arguments.attn_implementation, **hub
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArgumentError(f"model_name_or_path={name!r} cannot be loaded: {reason}") from error
    placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    return model.to("cuda") if on_gpu and torch.cuda.is_available() and not placed else model, tokenizer


def load_rows(option: str, name: str, split: str, *, config: str | None = None, on_bad_row: OnBadRow = "raise") -> Any:
    """The rows of a file, or of a split of a hub dataset; `option` names it in errors."""
    if Path(name).is_file():
        return read_rows(name, on_bad_row=on_bad_row)
    if Path(name).suffix in (".json", ".jsonl"):
        raise ArgumentError(f"{option}={name!r}: no such file")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ArgumentError(f"{option}={name!r} is no file, and hub datasets need `pip install datasets`") from None
    splits = load_dataset(name, config)
    if split not in splits:
        raise ArgumentError(f"{option}={name!r} has no split {split!r}; it has {sorted(splits)}")
    return splits[split]
