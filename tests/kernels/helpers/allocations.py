"""How much memory a call takes, seen by the allocator and so also inside operators."""

from collections.abc import Callable

from bench.core.memory import allocations, cpu_growth


def largest_allocation(call: Callable[[], object]) -> int:
    """The bytes of the largest single allocation on the CPU while `call` runs."""
    return max(allocations(call), default=0)


def peak_allocation(call: Callable[[], object]) -> int:
    """The most bytes on the CPU that `call` holds at once beyond those that were there before."""
    most = cpu_growth(call)
    assert most > 0, "the profiler recorded no allocation"
    return most
