"""The protocol of all benchmarks: competitors run in turn, round after round, and nothing is timed on red.

A case enters its competitors: each is built and called once, which warms it up; one that cannot run here is listed with
the reason. The case then checks what they compute. Only then `run` lets each competitor run once a round, one after the
other in one process (A B C A B C), so that a slow moment of the machine hits all of them. The times of all rounds go to
`extra_info` of pytest-benchmark, whose own table has ours alone; a ratio is the median over rounds of two times of one
round. Memory is measured last, out of the rounds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastqadapter_benchmarks.machine import describe
from fastqadapter_benchmarks.memory import failure, peaks_of
from fastqadapter_benchmarks.settings import Settings, is_ours

Call = Callable[[], Any]


def with_room(call: Call) -> Any:
    """`call()`, with room for the frames of all functions that it calls.

    CPython since 3.11 keeps frames in chunks of 16 KiB. Where a loop happens to call across the end of one, each call
    maps and unmaps the next: by the depth of the stack around it, here that of pytest, two passes with PEFT took 55 or
    118 ms a token, and ours 30 or 43. The frame of this function fits into no such chunk: it gets one of a MiB, with
    half of it left over for what comes after.
    """
    return call()


with_room.__code__ = with_room.__code__.replace(co_stacksize=66_000)  # words of 8 bytes


class Unavailable(Exception):
    """A competitor cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Competitor:
    """`build` makes the call that is timed. It is a partial of a module's function where memory is measured."""

    label: str
    build: Callable[[], Call]
    note: str = ""  # what a reader must know of it, such as "another loss"
    build_for_memory: Callable[[], Call] | None = None  # if its second run is to be another than that which is timed


class Race:
    """One case. The first competitor that enters is ours, the one that others are compared with."""

    def __init__(self, benchmark: Any, settings: Settings, suite: str, title: str, **shape: float):
        torch._dynamo.reset()  # it compiles a function only so often, and lets it run uncompiled from then on
        self.benchmark = benchmark
        self.settings = settings
        self.facts: dict[str, Any] = {"suite": suite, "title": title, "shape": shape, "errors": {}, "extra_mib": {}}
        self.facts["backward_seconds"] = {}
        self.calls: dict[str, Call] = {}
        self.results: dict[str, Any] = {}  # of the first calls
        self.absent: dict[str, str] = {}
        self._competitors: dict[str, Competitor] = {}

    def enter(self, competitors: Iterable[Competitor]) -> None:
        """Build every competitor and call it once. What is ours must run."""
        for competitor in competitors:
            label = competitor.label
            if self.calls and not self.settings.asks_for(label):
                continue
            try:
                call = competitor.build()
                result = with_room(call)
            except Exception as error:
                if is_ours(label):
                    raise
                self.absent[label] = _reason(error)
            else:
                self.calls[label], self.results[label] = call, result
                self._competitors[label] = competitor

    def withdraw(self, label: str, reason: str) -> None:
        """Take a competitor out that entered."""
        del self.calls[label], self._competitors[label]
        self.results.pop(label, None)
        self.absent[label] = reason

    @property
    def ours(self) -> str:
        return next(iter(self.calls))

    def run(self, metrics: Callable[[Any], dict[str, float]] | None = None, *, memory: bool = False) -> dict[str, Any]:
        """Time all rounds; returns what `extra_info` gets.

        Args:
            metrics: seconds, by name, that a competitor measured itself, from its result; default: those of its call.
            memory: also measure the peak memory of each.
        """
        seconds: dict[str, dict[str, list[float]]] = {}

        def timed(label: str) -> None:
            self._settle()
            start = time.perf_counter()
            result = with_room(self.calls[label])
            self._settle()
            found = {"time": time.perf_counter() - start} if metrics is None else metrics(result)
            for metric, value in found.items():
                seconds.setdefault(metric, {}).setdefault(label, []).append(value)
            if (backward := getattr(result, "backward_seconds", None)) is not None:
                self.facts["backward_seconds"].setdefault(label, []).append(backward)

        def others() -> None:
            for label in [*self.calls]:
                if label == self.ours:
                    continue
                try:
                    timed(label)
                except Exception as error:  # out of memory, now that all are there
                    if is_ours(label):
                        raise
                    self.withdraw(label, failure(error))
                    for times in seconds.values():
                        times.pop(label, None)

        self.results.clear()  # they hold memory
        self.benchmark.pedantic(lambda: timed(self.ours), setup=others, rounds=self.settings.rounds)
        notes = {label: competitor.note for label, competitor in self._competitors.items() if competitor.note}
        self.facts |= {"ours": self.ours, "seconds": seconds, "notes": notes, "absent": self.absent}
        self.facts["machine"] = describe(self.settings)
        if memory:
            self.measure_memory()
        self.benchmark.extra_info.update(self.facts)
        return self.facts

    def measure_memory(self) -> None:
        settings = self.settings
        builds = {label: each.build_for_memory or each.build for label, each in self._competitors.items()}
        peaks = peaks_of(builds, settings.device, settings.threads)
        self.facts["extra_mib"] = {label: peak for label, peak in peaks.items() if isinstance(peak, float)}
        self.facts["memory_unknown"] = {label: reason for label, reason in peaks.items() if isinstance(reason, str)}

    def _settle(self) -> None:
        if self.settings.on_gpu:
            torch.cuda.synchronize()


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f'{error.name} is not installed: pip install "fastqadapter[bench]"'
    return str(error) if isinstance(error, Unavailable) else failure(error)
