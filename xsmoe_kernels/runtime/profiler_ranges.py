"""Named ranges of a training step, for profilers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

Opener = Callable[[str], AbstractContextManager[object]]
Item = TypeVar("Item")

_open: Opener | None = None


def named_range(name: str) -> AbstractContextManager[object]:
    """Return a block around a part of a step. It costs one function call while no profiler records ranges."""
    if _open is None or torch.compiler.is_compiling():
        return nullcontext()
    return _open(name)


def each(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, with a range around the production of each."""
    iterator = iter(items)
    while True:
        try:
            with named_range(name):
                item = next(iterator)
        except StopIteration:
            return
        yield item


def ranges_open() -> bool:
    """Return whether ranges are recorded. Disable what hides the parts of a step then, such as CUDA graphs."""
    return _open is not None


@contextmanager
def opening_ranges(opener: Opener) -> Iterator[None]:
    """Open every named range with `opener` inside the block, in all threads."""
    global _open
    if _open is not None:
        raise RuntimeError("named ranges are being recorded already; one profile at a time")
    _open = opener
    try:
        yield
    finally:
        _open = None
