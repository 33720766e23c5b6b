"""The most memory that a step takes at any moment, seen by torch's allocator and so also inside operators."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Read when the profiler first starts, which would announce each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Peak(NamedTuple):
    """Bytes of torch's allocator, on a CPU of what it is asked for.

    Attributes:
        growth: at the peak of a step, beyond what was there before. Some of what it returns is among them, all of it
            or none: what is made after the peak is not.
        returned: what the step returns, each storage once.
    """

    growth: int
    returned: int


def measure_peak(step: Callable[[], Iterable[Tensor]], device: torch.device) -> Peak:
    """What a step takes of the device's memory."""
    results: list[Tensor] = []

    def call() -> None:
        results.extend(step())

    growth = _cuda_growth(call, device) if device.type == "cuda" else cpu_growth(call)
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in results)}
    return Peak(growth, sum(storage.nbytes() for storage in storages.values()))


def cpu_growth(call: Callable[[], object]) -> int:
    """The most bytes on the CPU that `call` holds at once beyond those that were there before."""
    held = most = 0
    for change in allocations(call):
        held += change
        most = max(most, held)
    return most


def allocations(call: Callable[[], object]) -> Iterator[int]:
    """The bytes that `call` takes on the CPU, and with a minus gives back, in the order of time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    yield from (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def _cuda_growth(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
