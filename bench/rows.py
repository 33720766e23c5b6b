"""The inputs of a case: sets of rows to rotate through."""

import math

import torch

from bench.workload import Tensors, Workload

ROTATED_BYTES = 128 << 20
"""Rows are rotated through so much memory, so that no round finds the last one's in a cache of its own."""
MOST_SETS = 16


class Rows:
    """Sets of rows to rotate through, by default many, in any dtype that a variant wants."""

    def __init__(self, workload: Workload, sets: int | None = None) -> None:
        first = workload.draw()
        size = max(1, sum(tensor.nbytes for tensor in first.values()))
        count = sets or min(MOST_SETS, max(2, math.ceil(ROTATED_BYTES / size)))
        self._dtype = workload.dtype
        self._sets: dict[torch.dtype, list[Tensors]] = {
            workload.dtype: [first, *(workload.draw() for _ in range(count - 1))]
        }

    def get(self, turn: int, dtype: torch.dtype | None) -> Tensors:
        """The rows of a round. Their values are the same in every dtype."""
        dtype = dtype or self._dtype
        if dtype not in self._sets:
            self._sets[dtype] = [
                {name: _cast(t, dtype) for name, t in rows.items()} for rows in self._sets[self._dtype]
            ]
        return self._sets[dtype][turn % len(self._sets[dtype])]


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
