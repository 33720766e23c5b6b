"""What a trainer asks of hidden states, wherever they come from, and an implementation for arrays in memory."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ItemFeatures(Protocol):
    """The hidden states of items. An item is known by its row, which never changes when items are appended."""

    @property
    def num_items(self) -> int:
        """How many items there are; rows run from 0 to num_items - 1."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities."""

    @property
    def dims(self) -> dict[str, int]:
        """Each modality's width D."""

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """For each modality a dtype that holds its hidden states as they are."""

    @property
    def num_levels(self) -> int:
        """How many levels every modality has, the lowest included: 3 for the levels 0, L/2, L."""

    def present(self, modality: str) -> np.ndarray:
        """(num_items,) bool: False where an item lacks this modality; its rows are then zeros."""

    def hidden(
        self, items: np.ndarray | Tensor, modalities: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, list[Tensor]]:
        """The hidden states of some items: per modality one tensor per level, in the order of the levels.

        A trainer on CUDA calls this from one thread of its own, ahead of the steps.

        Args:
            items: (N,) rows, integers; they may repeat, in any order.
            modalities: which of them, default all.
            dtype: of the result.

        Returns:
            For each level (N, D), on the CPU unless an implementation says otherwise, or (1, D) where the level is the
            same row for every item of the store and none of `items` lacks the modality. The last level is always
            (N, D).

        Raises:
            TypeError: items that are not integers.
            ValueError: a row out of range, or a modality that is not there.
        """

    def fingerprint(self, num_items: int | None = None) -> str:
        """A digest of what the hidden states are, to refuse a run that goes on with those of another encoder.

        It does not depend on how many items there are, so that features that grew keep theirs. Given `num_items`, it
        also covers which items the first `num_items` rows hold.
        """


class InMemoryFeatures:
    """`ItemFeatures` over tensors that are held already.

    Args:
        hidden: for every modality (N, levels, D), or a sequence of levels, each (N, D) or, for a level that is the same
            for every item, (1, D). All modalities have the same N and the same number of levels, at least 2.
        present: for some modalities (N,) bool, False where an item lacks it; default all True. The rows of such items
            are given out as zeros, whatever the tensors hold.

    Raises:
        ValueError: no modality, fewer than 2 levels, a last level that is not (N, D), or shapes that do not agree.
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
            raise ValueError(f"hidden must give at least 2 levels per modality, not {self._num_levels}")
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
                f"hidden[{name!r}] has {len(levels)} levels, other modalities {self._num_levels}; give all the same"
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
    """What `ItemFeatures` of some modalities share with the features that they give out in another form.

    Args:
        features: where hidden states come from.
        modalities: those that are wanted.
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
    """`items` as (N,) int64 on the host, each checked to lie in [0, num_items).

    Raises:
        TypeError: not integers.
        ValueError: not one-dimensional, or a row out of range.
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
            f"items must lie in [0, {num_items}), but holds {low if low < 0 else high}; "
            "an item that is not known must be encoded first"
        )
    return rows.astype(np.int64, copy=False)


def select_modalities(wanted: Sequence[str] | None, available: tuple[str, ...]) -> tuple[str, ...]:
    """`wanted`, each checked to be available; all that are where it is None.

    Raises:
        ValueError: a modality that is not there.
    """
    if wanted is None:
        return available
    for name in wanted:
        if name not in available:
            raise ValueError(f"there is no modality {name!r}; there are {', '.join(available)}")
    return tuple(wanted)


def constant_rows(row: Tensor, present: np.ndarray) -> Tensor:
    """A level that is the same for every item: (1, D), or (N, D) with zeros for items that lack the modality.

    Args:
        row: (1, D).
        present: (N,) bool.
    """
    if present.all():
        return row
    return row * torch.from_numpy(present)[:, None].to(row.dtype)


def check_known(num_items: int, available: int) -> None:
    """Raises ValueError unless the first `num_items` items are among the `available` ones."""
    if not 0 <= num_items <= available:
        raise ValueError(f"num_items must lie in [0, {available}], the number of items there are, not {num_items}")
