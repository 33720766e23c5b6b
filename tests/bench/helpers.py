"""Fake results, and benchmarks with one changed variant."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.core.benchmark import Benchmark, Implementation, Variant
from bench.core.results import Case, Role, Row, Run, Timing

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
ROLES = {"naive": Role.PAPER, "published": Role.PAPER, "compiled": Role.COMPILED, "liger": Role.LIBRARY}


def timing(*seconds: float, bound: float = 1e-3, against: tuple[str, ...] = ()) -> Timing:
    """Return a pass whose rounds lasted these seconds."""
    median, low, high = (float(q) for q in np.quantile(seconds, (0.5, 0.1, 0.9)))
    return Timing(
        median, low, high, list(seconds), dict.fromkeys(against, (1.0, 1.0, 1.0)), bound, bound / median, None
    )


def row(variant: str, peak: int | None = None, problem: str | None = None, **passes: Timing) -> Row:
    """Return a measured row."""
    row = unmeasured(variant, "measured")
    return replace(row, error=1.0, saved_bytes=1 << 20, peak_bytes=peak, problem=problem, passes=passes)


def unmeasured(variant: str, status: str, reason: str | None = None) -> Row:
    """Return a row without measurements."""
    role = Role.OURS if variant.startswith("ours") else ROLES.get(variant, Role.EAGER)
    return Row(variant, role, status, reason)


def case(*rows: Row, operator: str = "side_moe", sizes: Mapping[str, int] | None = None) -> Case:
    found = dict(sizes or {"N": 5, "E": 2})
    work = {"forward": 1e6, "backward": 2e6}
    return Case(operator, "title", found, "float32", "cpu", 1e12, 2e10, work, dict.fromkeys(work, 1e6), 3, list(rows))


def run(*cases: Case) -> Run:
    return Run(["kernels"], MACHINE, list(cases), 1.0)


def change_build(
    monkeypatch: pytest.MonkeyPatch,
    benchmark: Benchmark,
    name: str,
    build: Callable[[Variant], Implementation],
) -> None:
    """Replace the `build` of one variant of a benchmark."""
    variants = benchmark.variants

    def changed() -> list[Variant]:
        return [replace(one, build=lambda one=one: build(one)) if one.name == name else one for one in variants()]

    monkeypatch.setattr(benchmark, "variants", changed)
