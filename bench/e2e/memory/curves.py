"""The sweeps among cases, and the straight line through the points of a sweep."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.core.results import Case, Row

STRAIGHT = 0.05
"""The largest distance of a point from a straight line, as a share of the largest point."""


@dataclass(frozen=True)
class Curve:
    """Cases that differ in one size only, in the order of that size.

    Attributes:
        letter: of that size.
        cases: at least one.
    """

    letter: str
    cases: list[Case]

    @property
    def first(self) -> Case:
        """Return a case, for what all cases have in common."""
        return self.cases[0]

    @property
    def fixed(self) -> dict[str, int]:
        """Return the sizes that do not differ."""
        return {letter: size for letter, size in self.first.sizes.items() if letter != self.letter}

    @property
    def values(self) -> list[int]:
        return [case.sizes[self.letter] for case in self.cases]

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(row.variant for case in self.cases for row in case.rows))

    def rows(self, variant: str) -> list[Row | None]:
        """Return a variant's row of each case, or None."""
        return [next((row for row in case.rows if row.variant == variant), None) for case in self.cases]

    def points(self, variant: str, value: Callable[[Row], int | None]) -> list[tuple[int, int]]:
        """Return sizes and bytes of the cases in which a variant was measured."""
        found = [(size, row) for size, row in zip(self.values, self.rows(variant), strict=True) if row is not None]
        return [(size, held) for size, row in found if row.status == "measured" and (held := value(row)) is not None]


class Line(NamedTuple):
    """The straight line through some points.

    Attributes:
        slope: bytes per unit of the size.
        straight: whether no point is further from the line than `STRAIGHT`.
    """

    slope: float
    straight: bool


def curves(cases: Iterable[Case]) -> list[Curve]:
    """Return the sweeps among cases. A case that belongs to no sweep is a curve of its own."""
    groups: dict[tuple[object, ...], dict[int, Case]] = {}
    every = list(cases)
    for case in every:
        for letter, size in case.sizes.items():
            others = tuple((other, value) for other, value in case.sizes.items() if other != letter)
            groups.setdefault((case.operator, case.dtype, case.device, letter, others), {})[size] = case
    found = [
        Curve(str(key[3]), [group[size] for size in sorted(group)]) for key, group in groups.items() if len(group) > 1
    ]
    swept = [case for curve in found for case in curve.cases]
    return found + [Curve(next(iter(case.sizes)), [case]) for case in every if not any(case is one for one in swept)]


def fit(points: Sequence[tuple[int, int]]) -> Line | None:
    """Return the least-squares line; None for fewer than two points."""
    if len(points) < 2:
        return None
    sizes, held = (np.asarray(values, dtype=np.float64) for values in zip(*points, strict=True))
    slope, start = np.polyfit(sizes, held, 1)
    off = np.abs(slope * sizes + start - held).max()
    return Line(float(slope), bool(off <= STRAIGHT * np.abs(held).max()))
