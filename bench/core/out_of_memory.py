"""Out-of-memory handling: what does not fit is skipped, and the rest continues."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from xsmoe.out_of_memory import is_shortage as is_out_of_memory

T = TypeVar("T")
Task = Callable[[int], tuple[float, ...]]


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
