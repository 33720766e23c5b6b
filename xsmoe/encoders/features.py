"""The interface of hidden states for a trainer, and an implementation for tensors in memory."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ItemFeatures(Protocol):
    """The hidden states of items. An item is identified by its row, which never changes when items are appended."""

    @property
    def num_items(self) -> int:
        """Number of items; rows are 0 to num_items - 1."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities."""

    @property
    def dims(self) -> dict[str, int]:
        """Width D of each modality."""

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """For each modality, a dtype that represents its hidden states exactly."""

    @property
    def num_levels(self) -> int:
        """Number of levels of each modality, including the lowest: 3 for the levels 0, L/2, L."""

    def present(self, modality: str) -> np.ndarray:
        """Return (num_items,) bool, False for items without this modality, whose rows are zeros."""

    def hidden(
        self, items: np.ndarray | Tensor, modalities: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, list[Tensor]]:
        """Return the hidden states of some items: per modality one tensor per level, in the order of the levels.

        A trainer on CUDA calls this from a separate thread, ahead of the steps.

        Args:
            items: (N,) rows, integers, in any order; they may repeat.
            modalities: the modalities to return, default all.
            dtype: dtype of the result.

        Returns:
            For each level (N, D), on the CPU unless an implementation documents another device. A level is (1, D) if
            its row is the same for every item of the store and all of `items` have the modality. The last level is
            always (N, D).

        Raises:
            TypeError: items are not integers.
            ValueError: a row is out of range, or a modality does not exist.
        """

    def fingerprint(self, num_items: int | None = None) -> str:
        """Return a digest of the kind of hidden states. A run uses it to refuse hidden states of another encoder.

        The digest does not depend on the number of items, so it does not change when items are appended. With
        `num_items`, it also covers the identity of the first `num_items` items.
        """


class InMemoryFeatures:
    """`ItemFeatures` over tensors in memory.

    Args:
        hidden: for each modality (N, levels, D), or a sequence of levels, each (N, D), or (1, D) for a level that is
            the same for every item. All modalities have the same N and the same number of levels, at least 2.
        present: for some modalities (N,) bool, False for items without the modality; default all True. Rows of items
            without the modality are returned as zeros, whatever the tensors contain.

    Raises:
        ValueError: there is no modality, there are fewer than 2 levels, a last level is not (N, D), or shapes differ.
    """

    def __init__(
        self,
        hidden: Mapping[str, Tensor | Sequence[Tensor]],
        present: Mapping[str, np.ndarray | Tensor] | None = None,
    ) -> None:
        self._levels = {
            name: list(levels.unbind(1)) if isinstance(levels, Tensor) else list(levels)
            for name, levels in hidden.items()
        }
        if not self._levels:
            raise ValueError("hidden must name at least one modality, but is empty")
        first = next(iter(self._levels.values()))
        self._num_levels = len(first)
        if self._num_levels < 2:
            raise ValueError(f"hidden must have at least 2 levels per modality, not {self._num_levels}")
        self._num_items = first[-1].shape[0]
        for name, levels in self._levels.items():
            self._check(name, levels)
        self._present = {name: np.ones(self._num_items, dtype=bool) for name in self._levels}
        for name, mask in (present or {}).items():
            select_modalities([name], self.modalities)
            self._present[name] = np.asarray(mask, dtype=bool)
            if self._present[name].shape != (self._num_items,):
                raise ValueError(
                    f"present[{name!r}] must have shape ({self._num_items},), not {self._present[name].shape}"
                )

    def _check(self, name: str, levels: list[Tensor]) -> None:
        if len(levels) != self._num_levels:
            raise ValueError(
                f"hidden[{name!r}] has {len(levels)} levels, other modalities {self._num_levels}; make them equal"
            )
        want = (self._num_items, levels[-1].shape[-1])
        for number, level in enumerate(levels):
            constant = number < len(levels) - 1 and tuple(level.shape) == (1, want[1])
            if tuple(level.shape) != want and not constant:
                raise ValueError(
                    f"hidden[{name!r}][{number}] must have shape {want}, or (1, {want[1]}) if it is the same for every "
                    f"item and not the last level, but has {tuple(level.shape)}"
                )

    @property
    def num_items(self) -> int:
        return self._num_items

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self._levels)

    @property
    def dims(self) -> dict[str, int]:
        return {name: levels[-1].shape[1] for name, levels in self._levels.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {
            name: functools.reduce(torch.promote_types, (level.dtype for level in levels))
            for name, levels in self._levels.items()
        }

    @property
    def num_levels(self) -> int:
        return self._num_levels

    def present(self, modality: str) -> np.ndarray:
        select_modalities([modality], self.modalities)
        return self._present[modality]

    def hidden(
        self, items: np.ndarray | Tensor, modalities: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, list[Tensor]]:
        rows = row_indices(items, self._num_items)
        index = torch.from_numpy(rows)
        hidden = {}
        for name in select_modalities(modalities, self.modalities):
            has = self._present[name][rows]
            absent = torch.from_numpy(~has)
            levels = []
            for number, level in enumerate(self._levels[name]):
                if level.shape[0] == 1 and number < self._num_levels - 1:
                    levels.append(constant_rows(level.to("cpu", dtype), has))
                else:
                    chosen = level.detach().index_select(0, index.to(level.device)).to("cpu", dtype)
                    levels.append(chosen if has.all() else chosen.masked_fill_(absent[:, None], 0))
            hidden[name] = levels
        return hidden

    def fingerprint(self, num_items: int | None = None) -> str:
        structure = {name: (self.dims[name], self._num_levels) for name in sorted(self._levels)}
        digest = hashlib.sha256(repr(structure).encode())
        if num_items is not None:
            check_known(num_items, self._num_items)
            for name in sorted(self._levels):
                digest.update(self._present[name][:num_items].tobytes())
                for level in self._levels[name]:
                    digest.update(level[:num_items].detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()


class FeatureView:
    """The base class of `ItemFeatures` that wrap other features and return their hidden states in another form.

    Args:
        features: the wrapped features.
        modalities: the modalities to provide.
    """

    def __init__(self, features: ItemFeatures, modalities: Sequence[str]) -> None:
        self._features = features
        self._modalities = select_modalities(modalities, features.modalities)

    @property
    def num_items(self) -> int:
        return self._features.num_items

    @property
    def modalities(self) -> tuple[str, ...]:
        return self._modalities

    @property
    def dims(self) -> dict[str, int]:
        return {name: self._features.dims[name] for name in self._modalities}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: self._features.dtypes[name] for name in self._modalities}

    @property
    def num_levels(self) -> int:
        return self._features.num_levels

    def present(self, modality: str) -> np.ndarray:
        select_modalities([modality], self._modalities)
        return self._features.present(modality)

    def fingerprint(self, num_items: int | None = None) -> str:
        return self._features.fingerprint(num_items)


def row_indices(items: np.ndarray | Tensor, num_items: int) -> np.ndarray:
    """Return `items` as (N,) int64 on the host, after a check that each is in [0, num_items).

    Raises:
        TypeError: the items are not integers.
        ValueError: the items are not one-dimensional, or a row is out of range.
    """
    rows = items.detach().cpu().numpy() if isinstance(items, Tensor) else np.asarray(items)
    if rows.ndim != 1:
        raise ValueError(f"items must have shape (N,), not {rows.shape}")
    if rows.size == 0:
        return np.zeros(0, dtype=np.int64)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"items must be integers (rows of the items), not {rows.dtype}")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= num_items:
        raise ValueError(
            f"items must lie in [0, {num_items}), but holds {low if low < 0 else high}; encode unknown items first"
        )
    return rows.astype(np.int64, copy=False)


def select_modalities(wanted: Sequence[str] | None, available: tuple[str, ...]) -> tuple[str, ...]:
    """Return `wanted` after a check that each is available; all available modalities if `wanted` is None.

    Raises:
        ValueError: a modality does not exist.
    """
    if wanted is None:
        return available
    for name in wanted:
        if name not in available:
            raise ValueError(f"there is no modality {name!r}; there are {', '.join(available)}")
    return tuple(wanted)


def constant_rows(row: Tensor, present: np.ndarray) -> Tensor:
    """Return a level that is the same for every item: (1, D), or (N, D) with zeros if some items lack the modality.

    Args:
        row: (1, D).
        present: (N,) bool.
    """
    if present.all():
        return row
    return row * torch.from_numpy(present)[:, None].to(row.dtype)


def check_known(num_items: int, available: int) -> None:
    """Raise ValueError unless `num_items` is between 0 and `available`, the number of items."""
    if not 0 <= num_items <= available:
        raise ValueError(f"num_items must lie in [0, {available}], the number of items, not {num_items}")
