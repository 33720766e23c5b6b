"""How large a tensor a call makes, seen by the allocator and so also inside operators."""

from collections.abc import Callable

import torch


def largest_allocation(call: Callable[[], object]) -> int:
    """The bytes of the largest single allocation on the CPU while `call` runs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest > 0, "the profiler recorded no allocation"
    return largest
