"""How bytes grow along a sweep: its points, and the straight line through them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.results import Case, Row

STRAIGHT = 0.05
"""Points that lie off their line by more of the largest of them are on none."""


@dataclass(frozen=True)
class Curve:
    """Cases of which one size differs, in its order.

    Attributes:
        letter: that size's.
        cases: at least one.
    """

    letter: str
    cases: list[Case]

    @property
    def first(self) -> Case:
        """A case that stands for what all of them have in common."""
        return self.cases[0]

    @property
    def fixed(self) -> dict[str, int]:
        """The sizes that do not differ."""
        return {letter: size for letter, size in self.first.sizes.items() if letter != self.letter}

    @property
    def values(self) -> list[int]:
        return [case.sizes[self.letter] for case in self.cases]

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(row.variant for case in self.cases for row in case.rows))

    def rows(self, variant: str) -> list[Row | None]:
        """A variant's row of each case, None where it has none."""
        return [next((row for row in case.rows if row.variant == variant), None) for case in self.cases]

    def points(self, variant: str, value: Callable[[Row], int | None]) -> list[tuple[int, int]]:
        """Size and bytes, of the points where a variant was measured."""
        found = [(size, row) for size, row in zip(self.values, self.rows(variant), strict=True) if row is not None]
        return [(size, held) for size, row in found if row.status == "measured" and (held := value(row)) is not None]


class Line(NamedTuple):
    """The straight line through some points.

    Attributes:
        slope: bytes for one more of what is swept.
        straight: whether the points lie on it, but for `STRAIGHT` of the largest.
    """

    slope: float
    straight: bool


def curves(cases: Iterable[Case]) -> list[Curve]:
    """The sweeps among cases, which differ in one size only; a case of no sweep is a curve by itself."""
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
    """The line of least squares, or None through fewer than two points."""
    if len(points) < 2:
        return None
    sizes, held = (np.asarray(values, dtype=np.float64) for values in zip(*points, strict=True))
    slope, start = np.polyfit(sizes, held, 1)
    off = np.abs(slope * sizes + start - held).max()
    return Line(float(slope), bool(off <= STRAIGHT * np.abs(held).max()))
