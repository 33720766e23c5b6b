"""Two runs of the bench: which of our rows changed by more than the machine did meanwhile.

A machine is faster on one day than on another. What became of the rivals' times, whose code is the same, is taken to be
the machine's doing; a row counts as changed if it moved against them. Where two runs have no rival in common, the
measured rates stand in for them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.results import Case, Row, Run, Timing, lettered

LEAST = 0.05
"""A smaller change is none that anybody should act on."""
CONFIDENCE = 0.99
RESAMPLES = 2000
FEWEST_ROUNDS = 8
"""With fewer, the rounds' spread says too little about a median."""
OURS = ("ours", "plain", "reference")
"""What the names of variants that run our code begin with."""


@dataclass(frozen=True)
class Change:
    """What became of one pass of one of our rows.

    Attributes:
        case: operator, dtype, device and sizes.
        before, after: seconds, medians.
        machine: how many times longer what did not change takes in the second run.
        change: how many times longer this takes, by the machine's measure: 1 is no change.
        low, high: the interval of `change` in which it lies with `CONFIDENCE`.
        verdict: "slower", "faster", "same", or "few rounds", from which nothing follows.
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
    """What only one of two runs has of a case.

    Attributes:
        case: operator, dtype, device and sizes.
        lost: variants of ours of which the first run measured what the second did not.
        first, second: the other variants of which only that run measured something.
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
    """All rows of ours that both runs measured, and what only one of them has.

    Attributes:
        gaps: one for each case of which one run has what the other has not.
        differences: what is not the same about the machines.
    """

    changes: list[Change]
    gaps: list[Gap]
    differences: list[str]


def compare(before: Run, after: Run, least: float = LEAST) -> Comparison:
    """Compares the rows of ours that both runs have.

    Args:
        before, after: runs of the same cases, or of some in common.
        least: the smallest change that counts, above 0. Two processes of one build can differ by some percent, which no
            spread within them shows.
    """
    earlier, later = ({_label(case): case for case in run.cases} for run in (before, after))
    return Comparison(
        [
            change
            for label in earlier
            if label in later
            for change in _changes(label, earlier[label], later[label], least)
        ],
        list(_gaps(before, after)),
        [f"{what}: {one} and {other}" for what, one, other in _facts(before.machine, after.machine) if one != other],
    )


def _gaps(before: Run, after: Run) -> Iterator[Gap]:
    had, has = _passes(before), _passes(after)
    for label in dict.fromkeys((*had, *has)):
        earlier, later = had.get(label, {}), has.get(label, {})
        gone = _without(earlier, later)
        gap = Gap(
            label,
            [name for name in gone if name.startswith(OURS)],
            [name for name in gone if not name.startswith(OURS)],
            _without(later, earlier),
        )
        if gap.lost or gap.first or gap.second:
            yield gap


def _passes(run: Run) -> dict[str, dict[str, set[str]]]:
    """The passes that were measured, by case and variant."""
    return {
        _label(case): {row.variant: set(row.passes) for row in case.rows if row.status == "measured"}
        for case in run.cases
    }


def _without(some: Mapping[str, set[str]], others: Mapping[str, set[str]]) -> list[str]:
    """The variants of which some passes are not among those of others; which, where a part of them is."""
    found = []
    for name, passes in some.items():
        missing = passes - others.get(name, set())
        if missing:
            found.append(name if name not in others else f"{name} ({', '.join(sorted(missing))})")
    return found


def _facts(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    for what in ("threads", "gpu"):
        yield what, before.get(what), after.get(what)
    yield "processor", *(machine.get("cpu", {}).get("model") for machine in (before, after))
    yield "torch", *(machine.get("versions", {}).get("torch") for machine in (before, after))


def _changes(label: str, before: Case, after: Case, least: float) -> Iterator[Change]:
    pairs = [
        (row, other)
        for row in before.rows
        for other in after.rows
        if row.variant == other.variant and row.status == other.status == "measured"
    ]
    for row, other in pairs:
        if not row.variant.startswith(OURS):
            continue
        for one_pass in row.passes.keys() & other.passes.keys():
            yield _change(label, before, after, pairs, row.variant, one_pass, least)


def _change(
    label: str,
    before: Case,
    after: Case,
    pairs: Sequence[tuple[Row, Row]],
    variant: str,
    one_pass: str,
    least: float,
) -> Change:
    rng = np.random.default_rng(0)
    timings = {
        row.variant: (row.passes[one_pass], other.passes[one_pass])
        for row, other in pairs
        if one_pass in row.passes and one_pass in other.passes
    }
    rivals = [pair for name, pair in timings.items() if not name.startswith(OURS)]
    mine = timings[variant]
    rounds = _resampled(rng, mine[0]), _resampled(rng, mine[1])

    def logs(pair: tuple[Timing, Timing]) -> np.ndarray:
        """By how much the logarithm of the median grew: as it was, then for each resampling of the rounds."""
        medians = [
            np.concatenate([[np.median(t.samples)], np.median(np.asarray(t.samples)[r], axis=1)])
            for t, r in zip(pair, rounds, strict=True)
        ]
        return np.log(medians[1]) - np.log(medians[0])

    if rivals:
        machine = np.median([logs(pair) for pair in rivals], axis=0)
    else:
        machine = np.full(RESAMPLES + 1, math.log(_slower(before, after)))
    moved = logs(mine) - machine
    low, high = np.quantile(moved[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    bound = math.log1p(least)
    verdict = "slower" if low > 0 and moved[0] > bound else "faster" if high < 0 and moved[0] < -bound else "same"
    if min(len(timing.samples) for timing in mine) < FEWEST_ROUNDS:
        verdict = "few rounds"
    return Change(
        label,
        variant,
        one_pass,
        mine[0].median,
        mine[1].median,
        math.exp(machine[0]),
        math.exp(moved[0]),
        math.exp(low),
        math.exp(high),
        verdict,
    )


def _resampled(rng: np.random.Generator, timing: Timing) -> np.ndarray:
    """Rounds drawn with replacement. A round is one for all variants, since what disturbs one disturbs all."""
    return rng.integers(len(timing.samples), size=(RESAMPLES, len(timing.samples)))


def _slower(before: Case, after: Case) -> float:
    """How many times longer the machine takes, by the rates that were measured."""
    rates = [(before.flop_rate, after.flop_rate), (before.byte_rate, after.byte_rate)]
    found = [first / second for first, second in rates if first and second]
    return math.sqrt(math.prod(found)) if len(found) == 2 else math.prod(found)


def _label(case: Case) -> str:
    return f"{case.operator} {case.dtype} {case.device} {lettered(case.sizes)}"
