"""Our rows compared with the baselines of the same case, and two runs compared with each other."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.core.results import Case, Role, Row, Run, Timing
from bench.core.timing import Quantiles, ratios

BASELINE_ROLES = (Role.PAPER, Role.EAGER, Role.COMPILED, Role.LIBRARY)
MIN_CHANGE = 0.05
"""A smaller change between two runs is not worth a reaction."""
CONFIDENCE = 0.99
RESAMPLES = 2000
FEW_ROUNDS = 8
"""With fewer rounds, their spread says too little about the median."""


class Compared(NamedTuple):
    """A baseline's row, and our speed-up over it."""

    row: Row
    speedup: Quantiles


def baseline_role(row: Row) -> Role:
    """Return a baseline's role. Our reference counts as eager: it is plain PyTorch."""
    return Role.EAGER if row.role == Role.REFERENCE else row.role


def baselines(case: Case, row: Row) -> Iterator[Row]:
    """Yield the rows of a case that are not ours and solve the same problem as `row`."""
    yield from (other for other in case.rows if not other.ours and other.problem == row.problem)


def speedup(row: Row, baseline: Row, one_pass: str) -> Quantiles | None:
    """Return the speed-up in a pass, from the ratios of paired rounds; None if one of them has no times."""
    mine, theirs = row.passes.get(one_pass), baseline.passes.get(one_pass)
    return None if mine is None or theirs is None else ratios(mine.samples, theirs.samples)


def fastest(case: Case, row: Row, role: Role) -> Compared | None:
    """Return the fastest measured baseline of a role, by a whole step."""
    found = [
        Compared(other, ratio)
        for other in baselines(case, row)
        if baseline_role(other) == role and (ratio := speedup(row, other, row.step_pass))
    ]
    return min(found, key=lambda one: one.speedup.median, default=None)


def problem_notes(rows: Iterable[Row]) -> list[str]:
    """Return a line for each easier problem, with the variants that solve it and have an asterisk in tables."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.problem is not None and row.variant not in found.setdefault(row.problem, []):
            found[row.problem].append(row.variant)
    return [
        f"* {', '.join(names)}: solves another problem: {problem}; compared with each other only"
        for problem, names in found.items()
    ]


@dataclass(frozen=True)
class Change:
    """The change of one pass of one of our rows between two runs.

    Attributes:
        case: operator, dtype, device and sizes.
        before, after: median seconds.
        machine: the time of unchanged code in the second run, relative to the first.
        change: the time of this pass, relative to the first run and to `machine`; 1 is no change.
        low, high: the interval of `change` with `CONFIDENCE`.
        verdict: "slower", "faster", "same", or "few rounds", which allows no conclusion.
    """

    case: str
    variant: str
    one_pass: str
    before: float
    after: float
    machine: float
    change: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Gap:
    """Measurements of a case that only one of two runs has.

    Attributes:
        case: operator, dtype, device and sizes.
        lost: our variants that only the first run measured.
        first, second: other variants that only this run measured.
    """

    case: str
    lost: list[str]
    first: list[str]
    second: list[str]

    def __str__(self) -> str:
        parts = {"lost": self.lost, "in the first only": self.first, "in the second only": self.second}
        return f"{self.case}: " + "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names)


@dataclass(frozen=True)
class Comparison:
    """All our rows that both runs measured, what only one of them has, and differences of the machines."""

    changes: list[Change]
    gaps: list[Gap]
    differences: list[str]


def compare(before: Run, after: Run, least: float = MIN_CHANGE) -> Comparison:
    """Compare our rows of two runs.

    A machine is not equally fast every day. The change of the baselines' times, whose code is the same, is attributed
    to the machine, and a row has changed if it moved relative to them. If the runs have no baseline in common, the
    measured rates are used instead.

    Args:
        before, after: runs with cases in common.
        least: the smallest change that counts, above 0. Two processes of one build can differ by some percent, which
            the spread within a process does not show.
    """
    earlier, later = ({_label(case): case for case in run.cases} for run in (before, after))
    common = [label for label in earlier if label in later]
    facts = zip(_facts(before.machine), _facts(after.machine), strict=True)
    return Comparison(
        [change for label in common for change in _changes(earlier[label], later[label], least)],
        list(_gaps(earlier, later)),
        [f"{what}: {one} and {other}" for (what, one), (_, other) in facts if one != other],
    )


def _label(case: Case) -> str:
    return case.label.replace(f" {case.dtype} ", f" {case.dtype} {case.device} ", 1)


def _our_code(row: Row) -> bool:
    # The reference's code is ours, so its times do not measure the machine.
    return row.role in (Role.OURS, Role.REFERENCE)


def _gaps(earlier: Mapping[str, Case], later: Mapping[str, Case]) -> Iterator[Gap]:
    for label in dict.fromkeys((*earlier, *later)):
        had, has = (
            {row.variant: row for row in cases[label].rows if row.status == "measured"} if label in cases else {}
            for cases in (earlier, later)
        )
        gone = _without(had, has)
        lost = [text for name, text in gone.items() if _our_code(had[name])]
        first = [text for name, text in gone.items() if not _our_code(had[name])]
        gap = Gap(label, lost, first, list(_without(has, had).values()))
        if gap.lost or gap.first or gap.second:
            yield gap


def _without(some: Mapping[str, Row], others: Mapping[str, Row]) -> dict[str, str]:
    """Return the variants with passes that `others` lack; the text names the passes if `others` have a part."""
    found = {}
    for name, row in some.items():
        missing = set(row.passes) - set(others[name].passes if name in others else ())
        if missing:
            found[name] = f"{name} ({', '.join(sorted(missing))})" if name in others else name
    return found


def _facts(machine: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield from ((what, machine.get(what)) for what in ("threads", "gpu"))
    yield "processor", machine.get("cpu", {}).get("model")
    yield "torch", machine.get("versions", {}).get("torch")


def _changes(before: Case, after: Case, least: float) -> Iterator[Change]:
    others = {row.variant: row for row in after.rows if row.status == "measured"}
    pairs = [(row, others[row.variant]) for row in before.rows if row.status == "measured" and row.variant in others]
    for row, other in pairs:
        if _our_code(row):
            common = [one_pass for one_pass in row.passes if one_pass in other.passes]
            yield from (_change(before, after, pairs, row, one_pass, least) for one_pass in common)


def _change(
    before: Case, after: Case, pairs: Sequence[tuple[Row, Row]], row: Row, one_pass: str, least: float
) -> Change:
    rng = np.random.default_rng(0)
    timings = {
        first.variant: (first.passes[one_pass], second.passes[one_pass])
        for first, second in pairs
        if one_pass in first.passes and one_pass in second.passes
    }
    unchanged = [timings[one.variant] for one, _ in pairs if one.variant in timings and not _our_code(one)]
    mine = timings[row.variant]
    # Rounds, drawn with replacement. All variants get the same rounds, since a disturbance affects all of them.
    rounds = [rng.integers(len(one.samples), size=(RESAMPLES, len(one.samples))) for one in mine]

    def logs(pair: tuple[Timing, Timing]) -> np.ndarray:
        """Return the growth of the logarithm of the median: as measured, then for each resampling of the rounds."""
        medians = [
            np.concatenate([[np.median(t.samples)], np.median(np.asarray(t.samples)[r], axis=1)])
            for t, r in zip(pair, rounds, strict=True)
        ]
        return np.log(medians[1]) - np.log(medians[0])

    if unchanged:
        machine = np.median([logs(pair) for pair in unchanged], axis=0)
    else:
        machine = np.full(RESAMPLES + 1, math.log(_slower_by_rates(before, after)))
    moved = logs(mine) - machine
    low, high = np.quantile(moved[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    limit = math.log1p(least)
    verdict = "slower" if low > 0 and moved[0] > limit else "faster" if high < 0 and moved[0] < -limit else "same"
    if min(len(timing.samples) for timing in mine) < FEW_ROUNDS:
        verdict = "few rounds"
    return Change(
        _label(before), row.variant, one_pass, mine[0].median, mine[1].median,
        machine=math.exp(machine[0]), change=math.exp(moved[0]), low=math.exp(low), high=math.exp(high),
        verdict=verdict,
    )  # fmt: skip


def _slower_by_rates(before: Case, after: Case) -> float:
    """Return how many times longer the machine needs, by the measured rates."""
    rates = [(before.flop_rate, after.flop_rate), (before.byte_rate, after.byte_rate)]
    found = [first / second for first, second in rates if first and second]
    return math.sqrt(math.prod(found)) if len(found) == 2 else math.prod(found)
