"""Two runs against each other: what became slower.

Absolute times of a shared machine mean little from one day to the next. So a case is judged by our time over that of an
anchor that ran in the same rounds, of the kind that our changes do not touch: the base model alone, the bare GEMMs, the
published computation, another library. A case without one is judged by seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from fastqadapter_benchmarks.report import seconds, table
from fastqadapter_benchmarks.results import Result
from fastqadapter_benchmarks.settings import is_ours


@dataclasses.dataclass(frozen=True)
class Change:
    """One time of one case: above 1 it became slower."""

    name: str
    before: float  # seconds
    after: float
    anchor: str | None
    slowdown: float


def compare(old: Sequence[Result], new: Sequence[Result]) -> list[Change]:
    """Every time of ours that both runs have, the worst first.

    Raises:
        ValueError: they have none in common.
    """
    before = {_key(result): result for result in old}
    changes = [
        change for result in new if (was := before.get(_key(result))) is not None for change in _changes(was, result)
    ]
    if not changes:
        titles = sorted({result.title for result in old})
        raise ValueError(f"the runs have no case in common; the old one has: {'; '.join(titles) or 'none'}")
    return sorted(changes, key=lambda change: change.slowdown, reverse=True)


def _key(result: Result) -> tuple[object, ...]:
    return result.suite, result.title, result.axis, result.at


def not_compared(old: Sequence[Result], new: Sequence[Result]) -> list[str]:
    """What the old run has and the new one has not."""
    after = {_key(result): result for result in new}
    gone = [result.title for result in old if _key(result) not in after]
    lost = [
        f"{result.title}, {label}"
        for result in old
        if _key(result) in after
        for label in result.seconds[result.metric]
        if is_ours(label) and label not in after[_key(result)].seconds[result.metric]
    ]
    return gone + lost


def _changes(old: Result, new: Result) -> Iterator[Change]:
    where = f"{new.suite}: {new.title}" + (f", {new.axis} = {new.at:g}" if new.axis else "")
    for metric in new.seconds:
        mine = [label for label in new.seconds[metric] if is_ours(label)]
        for label in mine:
            if label not in old.seconds.get(metric, {}):
                continue
            anchor = _anchor(old, new, metric)
            before, after = old.median(label, metric), new.median(label, metric)
            if anchor is None:
                slowdown = after / before
            else:
                slowdown = new.ratio(label, anchor, metric) / old.ratio(label, anchor, metric)
            yield Change(f"{where}, {label}, {metric.replace('_', ' ')}", before, after, anchor, slowdown)


def _anchor(old: Result, new: Result, metric: str) -> str | None:
    in_both = [label for label in new.seconds[metric] if label in old.seconds[metric] and not is_ours(label)]
    first_choice = (label for label in (new.baseline, new.floor, "published") if label in in_both)
    return next(first_choice, in_both[0] if in_both else None)


def report(changes: Sequence[Change], limit: float) -> str:
    """A table of all changes, those over the limit marked."""
    rows = [
        [
            "SLOWER" if change.slowdown > limit else "",
            change.name,
            seconds(change.before),
            seconds(change.after),
            f"{change.slowdown:.2f}",
            change.anchor or "none: seconds",
        ]
        for change in changes
    ]
    return table(["", "what", "before", "after", "slowdown", "beside"], rows)
