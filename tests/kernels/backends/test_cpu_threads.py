"""The native kernels on torch's threads and from several Python threads at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.kernels.helpers.native_library import needs_library, run_python
from tests.kernels.helpers.native_side_moe import Call, check, native_results, oracle, results
from tests.kernels.helpers.side_level import Level, make_level
from xsmoe_kernels import FrozenExperts, Utilization, side_moe

pytestmark = needs_library

DTYPES = (torch.float32, torch.bfloat16)


def level(dtype: torch.dtype, seed: int = 0, one_row: bool = False) -> Level:
    """Return rows for seven threads: a thread processes about a million operations at a time."""
    return make_level(700, 50, 3, 17, dtype=dtype, one_row=one_row, seed=seed, requires_grad=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_row", [False, True])
def test_stays_within_the_error_budget_on_any_number_of_threads(dtype: torch.dtype, one_row: bool) -> None:
    call = Call(num_frozen=1, weighted=True)
    expected = oracle(level(dtype, one_row=one_row), call)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        first = check(level(dtype, one_row=one_row), call, expected)
        again = native_results(level(dtype, one_row=one_row), call)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name} on {count} threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    """Results do not depend on other rows; only sums over rows do."""
    call = Call(num_frozen=1)
    torch.set_num_threads(1)
    alone = native_results(level(dtype), call)
    torch.set_num_threads(7)
    together = native_results(level(dtype), call)
    for name in ("y", "gradient of x", "gradient of backbone"):
        assert torch.equal(alone[name], together[name]), name


@pytest.mark.parametrize("count", [1, 2])
def test_calls_from_several_python_threads_do_not_meet(count: int) -> None:
    torch.set_num_threads(count)
    work = [
        (level(dtype, seed, one_row=seed == 2), Call(num_frozen=seed % 2, apart=seed < 2, weighted=True))
        for dtype in DTYPES
        for seed in range(4)
    ]
    expected = [native_results(*item) for item in work]

    def run(place: int) -> None:
        # A thread of Python's that is new to torch begins with torch's number of threads.
        assert torch.get_num_threads() == count
        item, want = work[place % len(work)], expected[place % len(work)]
        # `native_results` would count the calls of other threads.
        found = results(*item, "native", item[0].x.dtype)
        for name, value in found.items():
            assert torch.equal(value, want[name]), name

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(10 * len(work))))


def test_threads_share_frozen_experts_and_counters_of_their_own() -> None:
    inputs = level(torch.float32)
    frozen = FrozenExperts(inputs.down[:2].clone(), inputs.up[:2].clone())
    trained = inputs._replace(down=inputs.down[2:], up=inputs.up[2:])

    def run(narrow: bool) -> tuple[torch.Tensor, torch.Tensor]:
        counters = Utilization(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return side_moe(*trained, frozen=frozen, utilization=counters), counters.norm

    expected = [run(narrow) for narrow in (False, True)]
    with ThreadPoolExecutor(4) as pool:
        for place, (y, norm) in enumerate(pool.map(run, [False, True] * 20)):
            assert torch.equal(y, expected[place % 2][0])
            assert torch.equal(norm, expected[place % 2][1])


def test_starts_no_threads_beyond_those_of_torch() -> None:
    script = """
import os, sys, torch
from tests.kernels.helpers.native_side_moe import Call, native_results
from tests.kernels.helpers.side_level import make_level
from concurrent.futures import ThreadPoolExecutor

level = make_level(700, 50, 3, 17, dtype=torch.float32, requires_grad=False)
tasks = lambda: len(os.listdir("/proc/self/task"))
for count in (1, 3):
    torch.set_num_threads(count)
    before = tasks()
    for _ in range(3):
        native_results(level, Call())
    print(tasks() - before)
torch.randn(3000, 3000).exp()
before = tasks()
for dtype in (torch.float32, torch.bfloat16):
    native_results(level._make(t.to(dtype) for t in level), Call(apart=True, num_frozen=1))
print(tasks() - before)
"""
    alone, three, warm = map(int, run_python("-c", script, OMP_NUM_THREADS="2").split())
    assert alone == 0, "one thread is the one that calls"
    assert three <= 2, "three threads are the one that calls and two more"
    assert warm == 0, "the threads that torch has started already serve"
