"""`fastqadapter eval`: what adapters have learned and what the model has forgotten."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from peft import get_peft_model_state_dict

from fastqadapter.commands.adapters import BaseArguments, load_adapters, name_adapters
from fastqadapter.commands.arguments import OneLineHfParser, load_rows
from fastqadapter.commands.parsing import ArgumentError
from fastqadapter.data import TokenizedRows, tokenize_rows
from fastqadapter.evaluation.capabilities import MOST, capability_set
from fastqadapter.evaluation.neutral import TEXTS
from fastqadapter.evaluation.report import format_report
from fastqadapter.evaluation.run import RESULTS, Evaluation, Evaluator, Plan
from fastqadapter.evaluation.scores import Point
from fastqadapter.evaluation.sweep import ALPHAS_0, ALPHAS_TILDE, WEIGHTS, Sweep
from fastqadapter.models import QAdapterModel
from fastqadapter.rows import longest_branch

logger = logging.getLogger(__name__)

REPORT = "eval.md"


@dataclasses.dataclass
class EvalArguments:
    """What to measure."""

    adapter: list[str] = dataclasses.field(
        metadata={
            "action": "extend",
            "help": "FOLDER or hub id, FOLDER=WEIGHT, NAME=FOLDER or NAME=FOLDER=WEIGHT; several are measured one by "
            "one",
        }
    )
    dataset_name: str = dataclasses.field(
        metadata={"help": "held-out pairs: a .jsonl or .json file of rows prompt/chosen/rejected, or a hub dataset"}
    )
    output_dir: str = dataclasses.field(metadata={"help": "folder of the results; a started one is continued"})
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "configuration of a hub dataset"})
    dataset_test_split: str = dataclasses.field(default="test", metadata={"help": "split of a hub dataset"})
    on_bad_row: Literal["raise", "skip"] = dataclasses.field(
        default="raise", metadata={"help": "stop at a malformed row, or skip and count it"}
    )
    max_pairs: int | None = dataclasses.field(default=None, metadata={"help": "take the first so many pairs"})
    max_length: int = dataclasses.field(default=1024, metadata={"help": "most tokens of prompt + response"})
    neutral_text: str | None = dataclasses.field(
        default=None, metadata={"help": "text file for KL and perplexity, paragraph by paragraph; default: our own"}
    )
    tasks: int = dataclasses.field(default=40, metadata={"help": f"items of each capability task, at most {MOST}"})
    alpha_0: list[float] = dataclasses.field(default_factory=lambda: list(ALPHAS_0), metadata={"help": "swept values"})
    alpha_tilde: list[float] = dataclasses.field(
        default_factory=lambda: list(ALPHAS_TILDE), metadata={"help": "swept values"}
    )
    weight: list[float] = dataclasses.field(default_factory=lambda: list(WEIGHTS), metadata={"help": "swept values"})
    grid: bool = dataclasses.field(default=False, metadata={"help": "all combinations instead of one dial at a time"})
    sweep: bool = dataclasses.field(default=True, metadata={"help": "false: the adapters' own dials alone"})
    keep: float = dataclasses.field(
        default=0.95, metadata={"help": "share of the base's right tasks that the sweet spot must keep"}
    )
    samples: int = dataclasses.field(default=4, metadata={"help": "held-out prompts answered side by side"})
    sample_tokens: int = dataclasses.field(default=64, metadata={"help": "most tokens of such an answer"})
    batch_size: int = dataclasses.field(default=8, metadata={"help": "pairs at once"})
    force: bool = dataclasses.field(default=False, metadata={"help": "take an adapter of another base model"})

    def __post_init__(self) -> None:
        for name, low in (("samples", 0), ("sample_tokens", 1), ("batch_size", 1), ("max_length", 2)):
            if getattr(self, name) < low:
                raise ArgumentError(f"{name}={getattr(self, name)} is outside its legal range [{low}, inf)")
        if not 1 <= self.tasks <= MOST:
            raise ArgumentError(f"tasks={self.tasks} is outside its legal range [1, {MOST}]")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ArgumentError(f"max_pairs={self.max_pairs} is outside its legal range [1, inf)")
        if not 0 <= self.keep <= 1:
            raise ArgumentError(f"keep={self.keep} is outside its legal range [0, 1]")
        for name in ("alpha_0", "alpha_tilde", "weight"):
            for value in getattr(self, name):
                try:
                    Point(**{name: value})
                except ValueError as error:
                    raise ArgumentError(f"{name}={value} cannot be swept: {error}") from None

    @property
    def dials(self) -> Sweep:
        if not self.sweep:
            return Sweep((), (), ())
        return Sweep(tuple(self.alpha_0), tuple(self.alpha_tilde), tuple(self.weight), self.grid)


def main(argv: list[str]) -> None:
    parser = OneLineHfParser(
        (EvalArguments, BaseArguments),
        prog="fastqadapter eval",
        description="Held-out preference accuracy, KL, perplexity and capability of adapters, for many dials.",
    )
    arguments, base_arguments = parser.parse(argv)
    folders, weights = name_adapters(arguments.adapter)
    texts = _texts(arguments.neutral_text)
    rows = load_rows(
        "dataset_name",
        arguments.dataset_name,
        arguments.dataset_test_split,
        config=arguments.dataset_config,
        on_bad_row=arguments.on_bad_row,
    )
    model, tokenizer = load_adapters(folders, base_arguments, force=arguments.force)
    pairs = tokenize_rows(rows, tokenizer, max_length=arguments.max_length, on_bad_row=arguments.on_bad_row)
    pairs = pairs if arguments.max_pairs is None else TokenizedRows(pairs[: arguments.max_pairs])
    _warn_of_long(pairs, model.config)
    home = {
        name: Point(config.alpha_0, config.alpha_tilde, weights[name])
        for name, config in model.qadapter_configs.items()
    }
    plan = Plan(
        pairs=pairs,
        texts=texts,
        items=capability_set(arguments.tasks),
        sweep=arguments.dials,
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        samples=arguments.samples,
        sample_tokens=arguments.sample_tokens,
        keep=arguments.keep,
    )
    folder = Path(arguments.output_dir)
    settings = {
        "base": str(base_arguments.model_name_or_path),
        "base_identity": model.base_identity,
        "dataset": arguments.dataset_name,
        "pairs": len(pairs),
        "dtype": str(model.dtype),
        "adapters": {name: _identity(model, name, folders[name], weights[name]) for name in folders},
        "data": _digest([*pairs, *texts]),
        "sweep": dataclasses.asdict(plan.sweep),
        **{name: getattr(arguments, name) for name in ("max_length", "tasks", "samples", "sample_tokens", "keep")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            results = Evaluator(model, tokenizer, plan, Evaluation(folder, settings)).run(home)
    except Timeout:
        raise ArgumentError(f"output_dir={arguments.output_dir!r}: another evaluation is running there") from None
    report = format_report(results)
    (folder / REPORT).write_text(report, encoding="utf-8")
    print(report)
    print(f"results: {folder / RESULTS}, {folder / REPORT}{_plot(results, folder)}")


def _warn_of_long(pairs: TokenizedRows, config: Any) -> None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    lengths = [longest_branch(row) for row in pairs]
    if limit and max(lengths) > limit:
        count = sum(length > limit for length in lengths)
        logger.warning("%d pairs are longer than the model's context of %d tokens: lower --max_length", count, limit)


def _texts(path: str | None) -> list[str]:
    """Paragraphs of a text file, or our own."""
    if path is None:
        return list(TEXTS)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"neutral_text={path!r}: not UTF-8: {error.reason} at byte {error.start}") from None
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    if not paragraphs:
        raise ArgumentError(f"neutral_text={path!r} is empty")
    return paragraphs


def _identity(model: QAdapterModel, name: str, folder: str, weight: float) -> dict[str, Any]:
    """What is measured: an adapter's weights and its config, wherever they came from."""
    digest = hashlib.sha256()
    for key, tensor in sorted(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()):
        digest.update(key.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    config = model.qadapter_configs[name].to_dict()
    return {"folder": folder, "sha256": digest.hexdigest()[:16], "weight": weight, "config": config}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _plot(results: dict[str, Any], folder: Path) -> str:
    try:
        from fastqadapter.evaluation.plots import plot_frontier
    except ImportError:
        logger.info('no plot of the frontier: pip install "fastqadapter[demo]" brings matplotlib')
        return ""
    return "".join(f", {path}" for path in plot_frontier(results, folder))
