"""Saved activations, peak memory, and out-of-memory handling.

What does not fit into memory is skipped, and the rest continues.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from xsmoe.out_of_memory import is_out_of_memory

T = TypeVar("T")
Task = Callable[[int], tuple[float, ...]]

# The profiler reads it at its first start. Without it, every start and stop is logged.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class SavedActivations:
    """Storages that autograd saved, each counted once."""

    def __init__(self, owned: Iterable[Tensor]) -> None:
        # The storages are referenced. Their addresses alone could be reused by the allocator.
        self._owned = _storages(owned)
        self._saved: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._owned:
            self._saved[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        """Return the bytes without the tensors that existed before."""
        return sum(storage.nbytes() for storage in self._saved.values())


@contextmanager
def count_saved(owned: Iterable[Tensor]) -> Iterator[SavedActivations]:
    """Count what autograd saves inside the block, without `owned`: inputs and parameters.

    Tensors that a function keeps outside of `save_for_backward` are not counted.
    """
    saved = SavedActivations(owned)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved


class Peak(NamedTuple):
    """Bytes of torch's allocator; on a CPU, the bytes that are requested from it.

    Attributes:
        growth: at the peak of a step, beyond what existed before. Tensors that the step returns are included if they
            are allocated before the peak.
        returned: what the step returns, each storage once.
    """

    growth: int
    returned: int


def measure_peak(step: Callable[[], Iterable[Tensor]], device: torch.device) -> Peak:
    """Return the peak memory of a step. torch's allocator also counts allocations inside operators."""
    results: list[Tensor] = []

    def call() -> None:
        results.extend(step())

    growth = _cuda_growth(call, device) if device.type == "cuda" else cpu_growth(call)
    return Peak(growth, sum(storage.nbytes() for storage in _storages(results).values()))


def cpu_growth(call: Callable[[], object]) -> int:
    """Return the most bytes on the CPU that `call` holds at once, beyond those that existed before."""
    held = most = 0
    for change in allocations(call):
        held += change
        most = max(most, held)
    return most


def allocations(call: Callable[[], object]) -> Iterator[int]:
    """Yield the bytes that `call` allocates on the CPU, and with a minus sign frees, in the order of time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    yield from (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def _cuda_growth(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class OutOfMemory(RuntimeError):
    """A task ran out of memory; `name` is the task's, and `reason` the first line of torch's message."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


def named(name: str, task: Task) -> Task:
    """Return a task that raises `OutOfMemory` with its name if it runs out of memory."""

    def run(turn: int) -> tuple[float, ...]:
        try:
            return task(turn)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(name, first_line(error)) from error

    return run


def try_run(run: Callable[[], T], device: torch.device) -> tuple[T | None, str]:
    """Return the result of a function, or None and the reason if it runs out of memory."""
    try:
        return run(), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # The traceback of the error held tensors, so memory can be released only after the except block.
    release(device)
    return None, reason


def release(device: torch.device) -> None:
    """Return unreferenced memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
