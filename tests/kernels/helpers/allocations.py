"""Memory of a call, measured by the allocator and therefore inside operators too."""

from collections.abc import Callable

from bench.core.memory import allocations, cpu_growth


def largest_allocation(call: Callable[[], object]) -> int:
    """Return the bytes of the largest single allocation on the CPU while `call` runs."""
    return max(allocations(call), default=0)


def peak_allocation(call: Callable[[], object]) -> int:
    """Return the peak of bytes on the CPU during `call`, beyond those allocated before."""
    most = cpu_growth(call)
    assert most > 0, "the profiler recorded no allocation"
    return most
