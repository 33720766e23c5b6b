"""Named ranges of a training step, for whoever looks at where its time goes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

Opener = Callable[[str], AbstractContextManager[object]]
Item = TypeVar("Item")

_open: Opener | None = None


def named_range(name: str) -> AbstractContextManager[object]:
    """Encloses a part of a step; nothing but a function call while nobody looks, which torch's own range is not."""
    if _open is None or torch.compiler.is_compiling():
        return nullcontext()
    return _open(name)


def each(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """The same items, with a range around the making of each."""
    iterator = iter(items)
    while True:
        try:
            with named_range(name):
                item = next(iterator)
        except StopIteration:
            return
        yield item


def ranges_open() -> bool:
    """Whether somebody looks; what hides a step's parts, as a captured graph does, has to be left out then."""
    return _open is not None


@contextmanager
def opening_ranges(opener: Opener) -> Iterator[None]:
    """Inside the block every named range is opened by `opener`, in all threads."""
    global _open
    if _open is not None:
        raise RuntimeError("named ranges are being recorded already; one profile at a time")
    _open = opener
    try:
        yield
    finally:
        _open = None
