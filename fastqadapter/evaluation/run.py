"""A whole evaluation: adapter after adapter, stage after stage, each kept on disk when it is done."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fastqadapter.data import PreferenceCollator, TokenizedRows
from fastqadapter.evaluation.capabilities import Item, answer_right
from fastqadapter.evaluation.forgetting import drifts, pack_texts
from fastqadapter.evaluation.learning import PairScores
from fastqadapter.evaluation.scores import Point, score_tokens
from fastqadapter.evaluation.sweep import Sweep, sweet_spot
from fastqadapter.models import QAdapterModel
from fastqadapter.models.base import lm_head_of

logger = logging.getLogger(__name__)

RESULTS = "eval.json"
FORMAT = 1
BASE = Point(weight=0.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, beside the model and its adapters."""

    pairs: TokenizedRows
    texts: Sequence[str]
    items: Sequence[Item]
    sweep: Sweep
    max_length: int = 1024
    batch_size: int = 8  # pairs; twice as many prompts
    samples: int = 4  # prompts of the held-out pairs that are answered side by side
    sample_tokens: int = 64
    keep: float = 0.95  # of the capability, for the sweet spot


class Evaluation:
    """Results of a folder. A stage that is in the file is not run again.

    Raises:
        ValueError: the folder holds an evaluation of something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))  # as the file will have them: lists for tuples
        self.results: dict[str, Any] = {"format": FORMAT, "settings": settings, "stages": {}}
        if self.path.exists():
            self.results = self._read()
            found = self.results["settings"]
            for name in sorted({*found, *settings}):
                if found.get(name) != settings.get(name):
                    raise ValueError(
                        f"{self.path}: an evaluation with {name}={found.get(name)!r}, not {settings.get(name)!r}: give "
                        "another --output_dir, or delete the file"
                    )
            logger.info("%s: %d stages are there already", self.path, len(self.results["stages"]))

    def _read(self) -> dict[str, Any]:
        try:
            results = json.loads(self.path.read_text(encoding="utf-8"))
            if results["format"] != FORMAT:
                raise ValueError(f"format {results['format']}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no evaluation of this version ({error}): delete it") from None
        return dict(results)

    def stage(self, name: str, run: Callable[..., Any], *args: Any) -> Any:
        """The result of a stage; `run(*args)` where it is missing."""
        if name not in self.results["stages"]:
            self.results["stages"][name] = run(*args)
            self.save()
        return self.results["stages"][name]

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, self.path)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """The stages of an evaluation on one loaded model."""

    model: QAdapterModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    evaluation: Evaluation

    def run(self, home: Mapping[str, Point]) -> dict[str, Any]:
        """Measure each adapter of `home` at all points of the sweep around its dials; returns what `eval.json` holds
        then."""
        self.model.eval()
        points = {name: self._points(name, center) for name, center in home.items()}  # refused ones before any work
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        stage, results = self.evaluation.stage, self.evaluation.results
        right = stage("base: capability", self._capability, BASE, "base")
        results["base"] = {
            "capability": _shares(self.plan.items, right),
            "samples": stage("base: samples", self._samples, BASE),
        }
        results["adapters"] = {name: self._adapter(name, own, right) for name, own in points.items()}
        self.evaluation.save()
        return results

    def _points(self, name: str, center: Point) -> list[Point]:
        """Of one adapter.

        Raises:
            ValueError: one of them cannot be computed.
        """
        points = self.plan.sweep.points(center, weights=self.model.qadapter_configs[name].q_head != "logits")
        head = lm_head_of(self.model.get_base_model())
        for point in points:
            self.model.dials(**point.generate_options(name)).mixture(head)
        return points

    def _adapter(self, name: str, points: Sequence[Point], base_right: Sequence[bool]) -> dict[str, Any]:
        self.model.set_adapter(name)
        stage, plan = self.evaluation.stage, self.plan
        learning = stage(f"{name}: pairs", self._pairs, points, name)
        drift = stage(f"{name}: text", self._texts, points, name)
        rows = []
        for number, point in enumerate(points):
            label = f"{name}: capability at {point}"
            right = stage(label, self._capability, point, label)
            measured = learning[number] | drift[number]
            measured |= {"capability": _shares(plan.items, right), "kept": _kept(base_right, right)}
            rows.append({"point": dataclasses.asdict(point), **measured})
        best = sweet_spot(rows, plan.keep)
        shown = [points[0]] if not best else [points[0], points[best]]
        samples = {str(point): stage(f"{name}: samples at {point}", self._samples, point) for point in shown}
        return {"rows": rows, "sweet_spot": best, "samples": samples}

    def _pairs(self, points: Sequence[Point], name: str) -> list[dict[str, Any]]:
        collate, pairs, size = PreferenceCollator(None, self.plan.max_length), self.plan.pairs, self.plan.batch_size
        parts = []
        for start in tqdm(range(0, len(pairs), size), desc=f"{name}: held-out pairs", disable=None):
            batch = collate(pairs[start : start + size])
            parts.append(PairScores.of(batch, score_tokens(self.model, batch, points)))
        scores = PairScores.join(parts)
        return [dataclasses.asdict(scores.at(index)) for index in range(len(points))]

    def _texts(self, points: Sequence[Point], name: str) -> list[dict[str, float]]:
        batches = pack_texts(self.tokenizer, self.plan.texts, self.plan.max_length)
        bar = tqdm(batches, desc=f"{name}: neutral text", disable=None)
        return [dataclasses.asdict(drift) for drift in drifts([score_tokens(self.model, each, points) for each in bar])]

    def _capability(self, point: Point, description: str) -> list[bool]:
        size = 2 * self.plan.batch_size
        return answer_right(
            self.model, self.tokenizer, self.plan.items, point, batch_size=size, description=description
        )

    @torch.no_grad()
    def _samples(self, point: Point) -> list[dict[str, str]]:
        """Greedy answers to the first held-out prompts."""
        found = []
        for row in self.plan.pairs[: self.plan.samples]:
            ids = torch.tensor([row["prompt_ids"]], device=self.model.device)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **point.generate_options(self.model.active_adapter),
                max_new_tokens=self.plan.sample_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            prompt, answer = (
                self.tokenizer.decode(part, skip_special_tokens=True).strip()
                for part in (row["prompt_ids"], output[0, ids.shape[1] :])
            )
            found.append({"prompt": prompt, "answer": answer})
        return found


def _shares(items: Sequence[Item], right: Sequence[bool]) -> dict[str, float]:
    """Share of each task that is right, and of all."""
    by_task: dict[str, list[bool]] = {}
    for item, each in zip(items, right, strict=True):
        by_task.setdefault(item.task, []).append(each)
    return {"all": sum(right) / len(right), **{task: sum(own) / len(own) for task, own in by_task.items()}}


def _kept(base: Sequence[bool], right: Sequence[bool]) -> float:
    """Of what the base has right, the share that still is; 1 where it has nothing to lose."""
    still = [now for before, now in zip(base, right, strict=True) if before]
    return sum(still) / len(still) if still else 1.0
