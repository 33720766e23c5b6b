"""A finder of data races: which program of a launch reads and writes which bytes, recorded in Triton's interpreter.

Programs of one launch run in any order on a GPU, so each byte that one of them writes belongs to it alone: no other
program may read or write it. An access has to stay inside the memory of the launch's tensors.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

SEVERAL_WRITERS = "written by several programs"
OTHER_READER = "read by another program than its writer"
OUT_OF_BOUNDS = "access outside the launch's tensors"


class Accesses(NamedTuple):
    """The bytes that a launch touched, and for each the number of its program."""

    addresses: list[np.ndarray]
    programs: list[np.ndarray]

    def add(self, program: int, pointers: np.ndarray, size: int) -> None:
        touched = (pointers[:, None] + np.arange(size)).ravel()
        self.addresses.append(touched)
        self.programs.append(np.full(touched.shape, program))

    def unique(self) -> np.ndarray:
        """Return (address, program) pairs in ascending order."""
        if not self.addresses:
            return np.empty((0, 2), np.int64)
        address, program = np.concatenate(self.addresses), np.concatenate(self.programs)
        order = np.lexsort((program, address))
        pairs = np.stack([address[order], program[order]], axis=1)
        return pairs[np.r_[True, (pairs[1:] != pairs[:-1]).any(1)]]


class Races:
    """What was found.

    Attributes:
        launches: how often each kernel was launched.
        found: for each (kernel, kind) the number of launches in which a race of this kind occurred.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.found: Counter[tuple[str, str]] = Counter()
        self._reads = self._writes = Accesses([], [])
        self._programs: dict[tuple[int, ...], int] = {}

    def record(self, written: bool, builder: Any, pointers: Any, mask: Any) -> None:
        """Record a masked load or store of the interpreter."""
        program = self._programs.setdefault(tuple(builder.grid_idx), len(self._programs))
        addresses = np.asarray(pointers.data).astype(np.int64)
        touched = addresses[np.broadcast_to(np.asarray(mask.data), addresses.shape).astype(bool)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        (self._writes if written else self._reads).add(program, touched, size)

    def run(self, launch: Any, executor: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Run a launch and compare what its programs touched."""
        self._reads, self._writes, self._programs = Accesses([], []), Accesses([], []), {}
        launch(executor, *arguments, **options)
        name = executor.fn.__name__
        self.launches[name] += 1
        reads, writes = self._reads.unique(), self._writes.unique()
        written, first, writers = np.unique(writes[:, 0], return_index=True, return_counts=True)
        if (writers > 1).any():
            self.found[name, SEVERAL_WRITERS] += 1
        place = np.searchsorted(written, reads[:, 0])
        inside = place < len(written)
        place, reads_inside = place[inside], reads[inside]
        same_byte = written[place] == reads_inside[:, 0]
        if (writes[first[place], 1] != reads_inside[:, 1])[same_byte].any():
            self.found[name, OTHER_READER] += 1
        if _any_outside(np.concatenate([reads[:, 0], writes[:, 0]]), _extents([*arguments, *options.values()])):
            self.found[name, OUT_OF_BOUNDS] += 1


def _any_outside(addresses: np.ndarray, extents: Sequence[tuple[int, int]]) -> bool:
    if not len(addresses):
        return False
    starts = np.array([start for start, _ in extents])
    ends = np.maximum.accumulate(np.array([end for _, end in extents]))
    place = np.searchsorted(starts, addresses, side="right") - 1
    return bool(((place < 0) | (addresses >= ends[place])).any())


def _extents(arguments: Sequence[Any]) -> list[tuple[int, int]]:
    """Return the first address and the end of each tensor's storage, in ascending order."""
    found = []
    for argument in arguments:
        if isinstance(argument, (tuple, list)):
            found += _extents(argument)
        elif isinstance(argument, torch.Tensor) and argument.numel():
            storage = argument.untyped_storage()
            found.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return sorted(found)


@contextmanager
def race_finder() -> Iterator[Races]:
    """Watch all launches in Triton's interpreter; on exit it is as before."""
    races = Races()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        races.record(False, self, pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        races.record(True, self, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_launch(self: Any, *arguments: Any, **options: Any) -> None:
        races.run(launch, self, arguments, options)

    with (
        mock.patch.object(builder, "create_masked_load", watched_load),
        mock.patch.object(builder, "create_masked_store", watched_store),
        mock.patch.object(executor, "__call__", watched_launch),
    ):
        yield races
