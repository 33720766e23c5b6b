"""The same benchmarks for pytest-benchmark: `python -m pytest bench --benchmark-only`."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import count

import pytest
import torch

from bench.cli.kernels import realistic_sizes
from bench.core.benchmark import Benchmark, Implementation, InputSets, Variant, load_benchmark, run_step
from bench.core.correctness import Checked, check
from bench.core.measure import inputs_and_truth
from bench.core.results import sizes_text
from bench.e2e.step import STEPS
from bench.ops import OPERATORS

pytest.importorskip("pytest_benchmark")
from pytest_benchmark.fixture import BenchmarkFixture

CPU = torch.device("cpu")


class SharedCase:
    """A case whose inputs and exact results all of its variants share."""

    def __init__(self, benchmark: Benchmark) -> None:
        torch._dynamo.reset()
        self.benchmark = benchmark
        self.inputs, self.truth = inputs_and_truth(benchmark)
        self.checked: dict[str, Checked] = {}

    def check(self, name: str) -> Checked:
        """Return the variant after its correctness check, which runs once."""
        if name not in self.checked:
            variant = self.benchmark.variant(name)
            self.checked[name] = check(self.benchmark, variant, self.inputs, self.truth)
        return self.checked[name]


@lru_cache(maxsize=1)
def shared_case(name: str, sizes: tuple[tuple[str, int], ...]) -> SharedCase:
    """Return one case. The memory of the last one is freed when the next begins."""
    return SharedCase(load_benchmark({**OPERATORS, **STEPS}, name)(dict(sizes), torch.float32, CPU))


def cases() -> Iterator[object]:
    """Yield benchmark, sizes, variant and pass, for the sizes of `--quick`. A training step has one pass."""
    for name in (*OPERATORS, *STEPS):
        kind = load_benchmark({**OPERATORS, **STEPS}, name)
        for sizes in realistic_sizes(kind, {**kind.default_sizes, **kind.quick_sizes}):
            label = f"{kind.operator} {sizes_text(sizes)}"
            for variant in kind.smallest(torch.float32, CPU).variants():
                for one_pass in ("forward", "both")[name in STEPS :] if variant.default else ():
                    where = f"{label}-{variant.name}-{one_pass}"
                    yield pytest.param(name, tuple(sizes.items()), variant.name, one_pass, id=where)


@pytest.mark.parametrize(("operator", "sizes", "name", "one_pass"), list(cases()))
@pytest.mark.benchmark(min_rounds=5, max_time=0.5, disable_gc=True)
def test_speed(
    benchmark: BenchmarkFixture, operator: str, sizes: tuple[tuple[str, int], ...], name: str, one_pass: str
) -> None:
    """Time a variant with right results. One that cannot run here is skipped, and a wrong one fails."""
    case = shared_case(operator, sizes)
    checked = case.check(name)
    row = checked.row
    if row.status in ("absent", "skipped") or checked.implementation is None:
        pytest.skip(f"{name} is {row.status}: {row.reason}")
    assert row.status == "measured", row.reason
    benchmark.group = f"{case.benchmark.operator} {sizes_text(dict(sizes))} {one_pass}"
    benchmark.extra_info.update(backend=row.backend, error=row.error, saved_bytes=row.saved_bytes)
    benchmark(step, checked.variant, checked.implementation, case.inputs, count(), one_pass)


def step(variant: Variant, built: Implementation, inputs: InputSets, turns: Iterator[int], one_pass: str) -> object:
    """Run forward, or a whole step; return the results, which live until the timer stops."""
    mine = inputs.get(next(turns), variant.dtype)
    return built.forward(mine) if one_pass == "forward" else run_step(built, mine)
