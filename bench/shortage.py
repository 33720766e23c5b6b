"""What happens where a device's memory does not suffice: something is left out, and the rest goes on."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from bench.measure import Task
from xsmoe.out_of_memory import is_shortage

T = TypeVar("T")


class OutOfMemory(RuntimeError):
    """A task for which memory does not suffice; its name, and what was said."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


def named(name: str, task: Task) -> Task:
    """A task that says its name when memory does not suffice, by `OutOfMemory`."""

    def run(turn: int) -> tuple[float, ...]:
        try:
            return task(turn)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            raise OutOfMemory(name, first_line(error)) from error

    return run


def fitting(run: Callable[[], T], device: torch.device) -> tuple[T | None, str]:
    """What a function gives, or None and what was said where memory does not suffice."""
    try:
        return run(), ""
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        reason = first_line(error)
    # Only here, where the error is gone, whose traceback held tensors.
    release(device)
    return None, reason


def release(device: torch.device) -> None:
    """Gives what nothing holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return next((row for row in str(error).splitlines() if row.strip()), type(error).__name__)
