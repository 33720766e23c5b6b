"""Bytes that a forward keeps for its backward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Saved:
    """Storages that autograd saved, each once."""

    def __init__(self, owned: Iterable[Tensor]) -> None:
        # Storages are held, not their addresses alone, which the allocator gives out again.
        self._owned = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in owned)}
        self._kept: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._owned:
            self._kept[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        """Beyond the tensors that were there before."""
        return sum(storage.nbytes() for storage in self._kept.values())


@contextmanager
def count_saved(owned: Iterable[Tensor]) -> Iterator[Saved]:
    """Counts what autograd saves inside the block, other than `owned`: inputs and parameters.

    What a function keeps outside of `save_for_backward` is not seen.
    """
    saved = Saved(owned)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved
