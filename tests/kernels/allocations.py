"""How much memory a call takes, seen by the allocator and so also inside operators."""

from collections.abc import Callable, Iterator

import torch


def largest_allocation(call: Callable[[], object]) -> int:
    """The bytes of the largest single allocation on the CPU while `call` runs."""
    return max(_changes(call))


def peak_allocation(call: Callable[[], object]) -> int:
    """The most bytes on the CPU that `call` holds at once beyond those that were there before."""
    held = most = 0
    for change in _changes(call):
        held += change
        most = max(most, held)
    return most


def _changes(call: Callable[[], object]) -> Iterator[int]:
    """Bytes taken, and with a minus given back, in the order of time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    yield from (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
