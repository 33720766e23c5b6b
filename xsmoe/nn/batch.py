"""A training batch: the distinct items of some users' sequences, with inputs and targets that index them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

WORD = torch.int64.itemsize
ALIGNED = 256
"""Alignment in bytes of the tensors of a packed batch. torch's CUDA allocator uses the same alignment."""


@dataclass(frozen=True)
class Batch:
    """B sequences of two or more items, as C distinct items and M inputs with a target each.

    Attributes:
        items: (C,) int64, the distinct items' ids, ascending.
        counts: (C,) float32, how often each item occurs in the batch.
        inputs: (M,) int64 indices into `items`: the concatenated sequences without their last items.
        offsets: (B + 1,) int64, where each sequence begins in `inputs`.
        targets: (M,) int64 indices into `items`: the item that follows each input.
        users: (M,) int64, the sequence of each input.
        rejected: (B, W) int64 indices into `items`: each sequence's own items, which are not its negatives; -1 pads.
        logq: (C,) float32, log of each item's sampling probability.
        lengths: the number of inputs of each sequence, on the host; None if it is unknown on the host.
        factor: () float32, the loss is multiplied by it, so that a mean over M inputs excludes padding; None means 1.
        ids: (C,) int64, each item's row of the ID table, -1 for an item without its ID; None for content only.
        storage: (S,) int64, the tensor that all others are views of; None if they have separate storage.
    """

    items: Tensor
    counts: Tensor
    inputs: Tensor
    offsets: Tensor
    targets: Tensor
    users: Tensor
    rejected: Tensor
    logq: Tensor
    lengths: tuple[int, ...] | None = None
    factor: Tensor | None = None
    ids: Tensor | None = None
    storage: Tensor | None = None

    @classmethod
    def from_sequences(cls, items: np.ndarray, offsets: np.ndarray, log_share: np.ndarray) -> Self:
        """Build the batch with array operations only.

        Args:
            items: (S,) int64, the concatenated item ids of the sequences.
            offsets: (B + 1,) int64, where each sequence begins. Every sequence has two or more items.
            log_share: for every item id, the log of its share of the training interactions (logQ).
        """
        lengths = np.diff(offsets)
        if len(lengths) and lengths.min() < 2:
            raise ValueError(f"offsets must give every sequence at least 2 items, but one has {lengths.min()}")
        distinct, codes = np.unique(items, return_inverse=True)
        codes = codes.reshape(-1).astype(np.int64)
        row = np.repeat(np.arange(len(lengths)), lengths)
        rejected = np.full((len(lengths), int(lengths.max(initial=0))), -1, dtype=np.int64)
        rejected[row, np.arange(len(items)) - offsets[row]] = codes
        is_first, is_last = np.zeros(len(items), dtype=bool), np.zeros(len(items), dtype=bool)
        is_first[offsets[:-1]], is_last[offsets[1:] - 1] = True, True
        arrays = {
            "items": distinct.astype(np.int64),
            "counts": np.bincount(codes, minlength=len(distinct)).astype(np.float32),
            "inputs": codes[~is_last],
            "offsets": (offsets - np.arange(len(offsets))).astype(np.int64),
            "targets": codes[~is_first],
            "users": row[~is_last],
            "rejected": rejected,
            "logq": log_share[distinct].astype(np.float32),
        }
        inputs: tuple[int, ...] = tuple((lengths - 1).tolist())
        return cls(lengths=inputs, **{name: torch.from_numpy(array) for name, array in arrays.items()})

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Self:
        """Return the batch in pinned memory."""
        return self._each(torch.Tensor.pin_memory)

    def num_padding(self, max_items: int) -> int:
        """Return the number of padding entries if each sequence is padded to `max_items`."""
        return (self.offsets.shape[0] - 1) * (max_items - 1) - self.inputs.shape[0]

    def packed(self) -> Self:
        """Return the batch in one tensor, which a single copy can move."""
        if self.storage is not None:
            return self
        tensors = self.tensors()
        places: dict[str, int] = {}
        size = 0
        for name, tensor in tensors.items():
            places[name] = size
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        packed = self._in(torch.zeros(size // WORD, dtype=torch.int64, device=self.items.device), places)
        for name, view in packed.tensors().items():
            view.copy_(tensors[name])
        return packed

    def clone(self) -> Self:
        """Return a copy of the batch."""
        return self._each(torch.Tensor.clone)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name, without the storage."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "storage"}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any]
        if self.storage is None:
            changed = {name: change(tensor) for name, tensor in self.tensors().items()}
            return replace(self, **changed)
        places = {name: int(tensor.storage_offset()) * tensor.itemsize for name, tensor in self.tensors().items()}
        return self._in(change(self.storage), places)

    def _in(self, storage: Tensor, places: Mapping[str, int]) -> Self:
        """Return a batch whose tensors have these shapes and begin at these byte offsets of a storage."""
        words = {dtype: storage.view(dtype) for dtype in (torch.int64, torch.float32)}
        views: dict[str, Any] = {
            name: words[tensor.dtype].as_strided(tensor.shape, _strides(tensor), places[name] // tensor.itemsize)
            for name, tensor in self.tensors().items()
        }
        return replace(self, storage=storage, **views)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: tensor.dim()])
