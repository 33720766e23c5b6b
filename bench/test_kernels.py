"""The same set-ups for pytest-benchmark: `python -m pytest bench --benchmark-only`."""

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench import kernels, steps
from bench.examine import Checked, Truth, examine
from bench.kernels_command import combinations
from bench.results import lettered
from bench.rows import Rows
from bench.workload import Variant, Workload, gradients

pytest.importorskip("pytest_benchmark")
from pytest_benchmark.fixture import BenchmarkFixture

CPU = torch.device("cpu")
# For forward and for a whole step.
PASSES = ("forward", "both")


class Bench:
    """A workload whose rows and exact results all of its variants share."""

    def __init__(self, workload: Workload) -> None:
        torch._dynamo.reset()
        self.workload = workload
        self.rows = Rows(workload)
        self.truth = Truth(workload, self.rows.get(0, None))
        self.checked: dict[str, Checked] = {}

    def check(self, name: str) -> Checked:
        """The variant behind the gate, which each passes once."""
        if name not in self.checked:
            self.checked[name] = examine(self.workload, name, self.rows, self.truth)
        return self.checked[name]


def room(name: str) -> type[Workload]:
    """An operator's, or a training step's with that pooling."""
    return (steps if name in steps.ROOMS else kernels).room(name)


@lru_cache(maxsize=1)
def bench(operator: str, sizes: tuple[tuple[str, int], ...]) -> Bench:
    """The bench of one case; the last one is let go, with its memory, when the next begins."""
    return Bench(room(operator)(dict(sizes), torch.float32, CPU))


def cases() -> Iterator[object]:
    """Room, sizes, variant and pass, for the sizes of `--quick`; a training step is one pass."""
    for operator in (*kernels.ROOMS, *steps.ROOMS):
        kind = room(operator)
        for sizes in filter(kind.sensible, combinations({**kind.letters, **kind.quick_sizes})):
            label = f"{kind.operator} {lettered(sizes)}"
            for name in kind(dict.fromkeys(sizes, 1), torch.float32, CPU).variants():
                for one_pass in PASSES[operator in steps.ROOMS :]:
                    yield pytest.param(operator, tuple(sizes.items()), name, one_pass, id=f"{label}-{name}-{one_pass}")


@pytest.mark.parametrize(("operator", "sizes", "name", "one_pass"), list(cases()))
@pytest.mark.benchmark(min_rounds=5, max_time=0.5, disable_gc=True)
def test_speed(
    benchmark: BenchmarkFixture, operator: str, sizes: tuple[tuple[str, int], ...], name: str, one_pass: str
) -> None:
    """Times a variant that is right; one that cannot run here is skipped, one that is wrong fails."""
    mine = bench(operator, sizes)
    checked = mine.check(name)
    variant, row = checked.variant, checked.row
    if row.status in ("absent", "skipped") or variant is None:
        pytest.skip(f"{name} is {row.status}: {row.reason}")
    assert row.status == "measured", row.reason
    benchmark.group = f"{mine.workload.operator} {lettered(dict(sizes))} {one_pass}"
    benchmark.extra_info.update(backend=row.backend, error=row.error, saved_bytes=row.saved_bytes)
    turns = iter(range(1 << 30))
    benchmark(step, variant, mine.rows, turns, one_pass)


def step(variant: Variant, rows: Rows, turns: Iterator[int], one_pass: str) -> Tensor | None:
    """One forward, and one backward if the pass has it; of a training step all that is timed as one."""
    taken = rows.get(next(turns), variant.dtype)
    if variant.whole is not None:
        variant.whole(taken)
        return None
    results = variant.forward(taken)
    if one_pass == "both":
        gradients(variant, taken, results)
    return results["y"]
