"""Results that nobody measured, for tests of what is made of results."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.results import Case, Row, Run, Timing

MACHINE: dict[str, Any] = {
    "cpu": {"model": "a processor", "cores": 2, "mhz": None, "capability": "AVX2"},
    "threads": 2,
    "memory_bytes": None,
    "info": {},
    "versions": {"torch": "2", "python": "3"},
    "commit": "abc",
    "load": None,
    "date": "today",
}


def timing(*seconds: float, floor: float = 1e-3, against: tuple[str, ...] = ()) -> Timing:
    """A pass of rounds that took so many seconds."""
    median, low, high = (float(q) for q in np.quantile(seconds, (0.5, 0.1, 0.9)))
    return Timing(
        median, low, high, list(seconds), dict.fromkeys(against, (1.0, 1.0, 1.0)), floor, floor / median, None
    )


def row(variant: str, peak: int | None = None, remark: str | None = None, **passes: Timing) -> Row:
    return Row(variant, "measured", error=1.0, saved_bytes=1 << 20, peak_bytes=peak, remark=remark, passes=passes)


def case(*rows: Row, operator: str = "side_moe", sizes: Mapping[str, int] | None = None) -> Case:
    found = dict(sizes or {"N": 5, "E": 2})
    work = {"forward": 1e6, "backward": 2e6}
    return Case(operator, "title", found, "float32", "cpu", 1e12, 2e10, work, dict.fromkeys(work, 1e6), 3, list(rows))


def run(*cases: Case) -> Run:
    return Run(["kernels"], MACHINE, list(cases), 1.0)
