"""Steps below a machine's ceilings: the rate of its matrix products, and that of its memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from bench.core.results import Case, Role, Run
from bench.report.comparison import baseline_role
from bench.report.tables import markdown_table, percent


class Ceilings(NamedTuple):
    """Measured rates of a machine: FLOP and bytes per second."""

    flop: float
    bytes: float

    def at(self, intensity: float) -> float:
        """Return the most FLOP per second at this number of FLOP per byte."""
        return min(self.flop, self.bytes * intensity)

    @property
    def ridge(self) -> float:
        """Return the FLOP per byte above which products are the limit."""
        return self.flop / self.bytes


class Point(NamedTuple):
    """A variant of a case.

    Attributes:
        machine: as `machine_of` returns it.
        variant: with an asterisk, if it solves an easier problem.
        intensity: FLOP per byte of the least work; 0 if it has no bytes.
        by_flop: whether `rate` and `ceiling` are FLOP per second. They are bytes per second without a matrix rate.
        rate: of the whole step, for the least work.
        ceiling: the highest rate at this intensity, by the rates measured between the case's rounds.
    """

    case: Case
    machine: str
    variant: str
    role: Role
    intensity: float
    by_flop: bool
    rate: float
    ceiling: float

    @property
    def share(self) -> float:
        return self.rate / self.ceiling


def points(runs: Sequence[Run]) -> list[Point]:
    """Return a point for each timed variant, of each case with measured rates."""
    return [point for run in runs for case in run.cases for point in _points(case, machine_of(run, case))]


def _points(case: Case, machine: str) -> Iterator[Point]:
    flop, moved = sum(case.flop.values()), sum(case.bytes.values())
    # The bound is the time of the same work at the ceiling.
    by_flop = bool(flop and case.flop_rate)
    work, intensity = flop if by_flop else moved, flop / moved if moved else 0.0
    for row in case.rows:
        if row.step is not None and row.step.bound > 0:
            rates = work / row.step.median, work / row.step.bound
            yield Point(case, machine, row.label, baseline_role(row), intensity, by_flop, *rates)


def machine_of(run: Run, case: Case) -> str:
    """Return processor or GPU, threads, and torch version.

    Raises:
        KeyError: the run lacks one of them.
    """
    facts = run.machine
    chip = facts["gpu"]["name"] if case.device == "cuda" else facts["cpu"]["model"]
    return f"{chip}, {facts['threads']} threads, torch {facts['versions']['torch']}"


def machines(runs: Sequence[Run]) -> list[str]:
    """Return the distinct machines."""
    return list(dict.fromkeys(machine_of(run, case) for run in runs for case in run.cases))


def ceilings(runs: Sequence[Run]) -> dict[str, Ceilings]:
    """Return the highest rates of any case, by device and dtype, and by machine if there are several."""
    several = len(machines(runs)) > 1
    found: dict[str, Ceilings] = {}
    for run in runs:
        for case in run.cases:
            if not (case.byte_rate and case.flop_rate):
                continue
            name = f"{case.device} {case.dtype}" + f", {machine_of(run, case)}" * several
            known = found.get(name, Ceilings(0.0, 0.0))
            found[name] = Ceilings(max(known.flop, case.flop_rate), max(known.bytes, case.byte_rate))
    return found


def ceilings_table(found: Mapping[str, Ceilings]) -> str:
    """Return the highest rates, and the ridge of each pair."""
    body = [
        [name, f"{roof.flop / 1e9:.0f}", f"{roof.bytes / 1e9:.1f}", f"{roof.ridge:.1f}"] for name, roof in found.items()
    ]
    return "\n".join(markdown_table(["ceilings", "GFLOP/s", "GB/s of a copy", "ridge, FLOP/byte"], body))


def points_table(found: Sequence[Point]) -> str:
    """Return a row for each variant of each case, with its machine if there are several."""
    body = []
    several = len({point.machine for point in found}) > 1
    for point in found:
        unit = "GFLOP/s" if point.by_flop else "GB/s"
        cells = [point.case.label, *([point.machine] if several else []), point.variant, f"{point.intensity:.1f}"]
        body.append(
            [*cells, *(f"{_digits(r / 1e9)} {unit}" for r in (point.rate, point.ceiling)), percent(point.share)]
        )
    head = ["case", *(["machine"] if several else []), "variant", "FLOP/byte", "reached", "ceiling", "share"]
    return "\n".join(markdown_table(head, body))


def _digits(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
