"""Which dials are tried, and which of them is the sweet spot."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fastqadapter.evaluation.scores import Point

ALPHAS_0 = (0.5, 0.75, 1.25, 1.5, 2.0)
ALPHAS_TILDE = (0.5, 0.75, 1.25, 1.5)
WEIGHTS = (0.25, 0.5, 0.75, 1.5, 2.0, 3.0)
DIALS = ("weight", "alpha_0", "alpha_tilde")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Values of each dial. One at a time, the others where the adapter's config has them; or, as a grid, all
    combinations."""

    alpha_0: Sequence[float] = ALPHAS_0
    alpha_tilde: Sequence[float] = ALPHAS_TILDE
    weight: Sequence[float] = WEIGHTS
    grid: bool = False

    def points(self, home: Point, weights: bool = True) -> list[Point]:
        """`home` first, no point twice; without `weights` (a `logits` head) the weight stays."""
        values = {name: tuple(getattr(self, name)) for name in DIALS}
        if not weights:
            values["weight"] = ()
        if self.grid:
            with_home = {name: {getattr(home, name): None, **dict.fromkeys(own)} for name, own in values.items()}
            found = [
                Point(**dict(zip(with_home, each, strict=True))) for each in itertools.product(*with_home.values())
            ]
        else:
            found = [dataclasses.replace(home, **{name: value}) for name, own in values.items() for value in own]
        return list(dict.fromkeys([home, *found]))


def swept(home: Point, point: Point) -> str | None:
    """The dial in which alone a point differs from `home`; None for `home` itself and where several differ."""
    changed = [name for name in DIALS if getattr(point, name) != getattr(home, name)]
    return changed[0] if len(changed) == 1 else None


def sweet_spot(rows: Sequence[Mapping[str, Any]], keep: float) -> int | None:
    """Index of the row with the highest accuracy among those that keep at least `keep` of the capability; of equal
    ones that with the least KL. None where no row keeps so much."""
    allowed = [index for index, row in enumerate(rows) if row["kept"] >= keep]
    return max(allowed, key=lambda index: (rows[index]["accuracy"]["value"], -rows[index]["kl"]), default=None)
