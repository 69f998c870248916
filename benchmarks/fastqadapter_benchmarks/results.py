"""What a run has measured, read from pytest-benchmark's JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAIN_METRIC = {"decode": "per_token", "adapters": "per_token", "compiled": "per_token"}


@dataclasses.dataclass(frozen=True)
class Result:
    """One case: seconds of every competitor in every round, and what else `race.Race` noted."""

    suite: str
    title: str
    ours: str
    seconds: Mapping[str, Mapping[str, Sequence[float]]]  # metric -> label -> rounds
    shape: Mapping[str, float]
    extra_mib: Mapping[str, float]
    errors: Mapping[str, float]
    notes: Mapping[str, str]
    absent: Mapping[str, str]
    machine: Mapping[str, Any]
    backward_seconds: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)  # a part of the time
    variant: str = ""  # what it is, if not the loss with gradient in bf16
    memory_unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)  # why
    kv_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    baseline: str | None = None  # the base model alone, where there is one
    axis: str | None = None  # of a sweep: what is doubled
    at: float | None = None

    @property
    def size(self) -> float | None:
        """Of what is doubled: as measured where that is known, such as state rows, else as asked for."""
        return None if self.axis is None else self.shape.get(self.axis, self.at)

    @property
    def metric(self) -> str:
        """The one that the case is about."""
        main = MAIN_METRIC.get(self.suite, "time")
        return main if main in self.seconds else next(iter(self.seconds))

    @property
    def labels(self) -> list[str]:
        """Fastest first."""
        return sorted(self.seconds[self.metric], key=self.median)

    @property
    def floor(self) -> str | None:
        """The least work that the mathematics needs, as torch does it, where it was run."""
        return next((label for label, note in self.notes.items() if note == "floor"), None)

    @property
    def reference(self) -> str | None:
        """The base model alone, or the floor, if it was run."""
        label = self.baseline or self.floor
        return label if label in self.seconds[self.metric] else None

    def median(self, label: str, metric: str | None = None) -> float:
        return statistics.median(self.seconds[metric or self.metric][label])

    def quartiles(self, label: str, metric: str | None = None) -> tuple[float, float]:
        times = self.seconds[metric or self.metric][label]
        if len(times) < 2:
            return times[0], times[0]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        return low, high

    def ratio(self, label: str, to: str, metric: str | None = None) -> float:
        """Median over rounds of the two times of one round."""
        seconds = self.seconds[metric or self.metric]
        return statistics.median(a / b for a, b in zip(seconds[label], seconds[to], strict=True))


def read_results(path: Path) -> list[Result]:
    """The cases of a file that `fastqadapter bench` or pytest-benchmark wrote.

    Raises:
        ValueError: the file is not there, or is not of these benchmarks.
    """
    try:
        found = results_of(json.loads(path.read_text(encoding="utf-8")))
        whole = all(map(_is_whole, found))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} does not hold results of `fastqadapter bench` (its benchmark.json does)")
    return found


def _is_whole(result: Result) -> bool:
    """Of every competitor as many times as of ours, all of them numbers above 0."""
    return all(
        0 < len(times) == len(lines[result.ours]) and all(0 < each < math.inf for each in times)
        for lines in result.seconds.values()
        for times in lines.values()
    )


def results_of(report: Mapping[str, Any]) -> list[Result]:
    names = {field.name for field in dataclasses.fields(Result)}
    found = [each["extra_info"] for each in report["benchmarks"]]
    return [Result(**{name: value for name, value in facts.items() if name in names}) for facts in found]


def merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of pytest-benchmark with the cases of several."""
    return {**reports[0], "benchmarks": [case for report in reports for case in report["benchmarks"]]}


def fitted_exponent(points: Mapping[float, float]) -> float:
    """p of the least-squares line log y = p log x + c; NaN of fewer than two points."""
    logs = [(math.log(x), math.log(y)) for x, y in points.items() if y > 0]
    if len(logs) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def growth(results: Sequence[Result]) -> dict[str, dict[str, dict[float, float]]]:
    """axis -> label -> size -> median seconds, of the sweeps."""
    table: dict[str, dict[str, dict[float, float]]] = {}
    for result in results:
        if result.size is not None:
            for label in result.seconds[result.metric]:
                table.setdefault(str(result.axis), {}).setdefault(label, {})[result.size] = result.median(label)
    return table


def memory_growth(results: Sequence[Result]) -> dict[str, dict[str, dict[float, float]]]:
    """axis -> label -> size -> peak MiB, of the sweeps that measured it."""
    table: dict[str, dict[str, dict[float, float]]] = {}
    for result in results:
        if result.size is not None:
            for label, peak in result.extra_mib.items():
                table.setdefault(str(result.axis), {}).setdefault(label, {})[result.size] = peak
    return table
