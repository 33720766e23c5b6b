"""A training batch: the distinct items of some users' sequences, and who follows whom."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B sequences of two or more items, as C distinct items and M inputs, each with the item that follows it.

    Attributes:
        items: (C,) int64, the distinct items' ids, ascending.
        counts: (C,) float32, how often each stands in the batch.
        inputs: (M,) int64 into items, the sequences without their last item, laid end to end.
        offsets: (B + 1,) int64, where each sequence begins in `inputs`.
        targets: (M,) int64 into items, the item that follows each input.
        users: (M,) int64, the sequence of each input.
        rejected: (B, W) int64 into items, each sequence's own items, -1 = none: no negatives for it.
        logq: (C,) float32, log of each item's sampling probability.
        lengths: the number of inputs of each sequence, on the host; None where nobody counted them.
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

    @classmethod
    def from_sequences(cls, items: np.ndarray, offsets: np.ndarray, log_share: np.ndarray) -> Self:
        """Builds the batch with array operations only.

        Args:
            items: (S,) int64, the sequences' item ids, laid end to end.
            offsets: (B + 1,) int64, where each sequence begins; every sequence has two items or more.
            log_share: for every item id the log of its share of the training interactions (logQ).
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
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Self:
        """The same batch in pinned memory."""
        return self._each(torch.Tensor.pin_memory)

    def num_padding(self, max_items: int) -> int:
        """How many places the sequences leave empty if each is padded to `max_items`."""
        return (self.offsets.shape[0] - 1) * (max_items - 1) - self.inputs.shape[0]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {key: change(value) for key, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)
