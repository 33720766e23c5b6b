"""Store of conditioned hidden states on disk, with the format and the checksums of the original store."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from xsmoe.encoders import HiddenStateStore, ItemFeatures, ModalitySpec, StoreError
from xsmoe.encoders.features import row_indices
from xsmoe.encoders.manifest import MANIFEST
from xsmoe.stream.hidden_states.conditioned import ConditionedFeatures
from xsmoe.stream.hidden_states.device_cache import constant_levels

ITEMS_PER_CHUNK = 8192
NAME_LENGTH = 16


class ConditionedStore:
    """`ItemFeatures` whose conditioned rows are read from a store on disk. Create it with `open`.

    All values are bitwise equal to those of the conditioned features that they were copied from.
    """

    def __init__(self, store: HiddenStateStore, view: ConditionedFeatures) -> None:
        self._store, self._view = store, view
        self._constant = {name: constant_levels(view, name).keys() for name in view.modalities}

    @classmethod
    def open(cls, folder: Path, view: ConditionedFeatures) -> Self:
        """Open the store in `folder`. If it is missing or incomplete, write the missing rows first.

        A store of another conditioning or of other items is replaced. Only one process at a time may call this.

        Args:
            folder: folder for the store and nothing else; created if it does not exist.
            view: the conditioned features.

        Raises:
            StoreError: the store is damaged, or cannot be written.
            ValueError: a conditioned row exceeds its dtype.
        """
        place = folder / view.fingerprint()[:NAME_LENGTH]
        try:
            for other in folder.iterdir() if folder.exists() else ():
                if re.fullmatch(rf"[0-9a-f]{{{NAME_LENGTH}}}", other.name) and other != place:
                    _remove(other)
            return cls(_grown(place, view), view)
        except OSError as error:
            raise StoreError(
                f"cannot write the conditioned hidden states to {place}: {error.strerror}; free disk space there, or "
                "keep them in memory with a higher --store-gib, and run the same command again"
            ) from error

    @property
    def num_items(self) -> int:
        return self._store.num_items

    @property
    def modalities(self) -> tuple[str, ...]:
        return self._view.modalities

    @property
    def dims(self) -> dict[str, int]:
        return self._view.dims

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return self._view.dtypes

    @property
    def num_levels(self) -> int:
        return self._view.num_levels

    def present(self, modality: str) -> np.ndarray:
        return self._store.present(modality)

    def hidden(
        self, items: np.ndarray | Tensor, modalities: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, list[Tensor]]:
        found = self._store.hidden(items, modalities, dtype=dtype)
        for name, levels in found.items():
            for place, level in enumerate(levels):
                if len(level) == 1 and place not in self._constant[name]:
                    # The store keeps equal rows only once. The features that they were copied from may repeat them.
                    levels[place] = level.expand(len(row_indices(items, self.num_items)), -1)
        return found

    def fingerprint(self, num_items: int | None = None) -> str:
        return self._view.fingerprint(num_items)


def _grown(place: Path, view: ConditionedFeatures) -> HiddenStateStore:
    """Return the store in `place`, after adding the rows of items that it does not have yet."""
    ids = _ids(view.source)
    specs = {
        name: ModalitySpec(
            view.dims[name],
            tuple(range(view.num_levels)),
            view.dtypes[name],
            encoder="conditioned",
            revision=view.fingerprint(),
        )
        for name in view.modalities
    }
    store = _existing(place)
    if store is not None:
        store.check_specs(specs)
        if store.item_ids.tolist() != ids[: store.num_items].tolist():
            store = None
    if store is None:
        _remove(place)
        store = HiddenStateStore.create(place, specs)
    for start in range(store.num_items, view.num_items, ITEMS_PER_CHUNK):
        rows = np.arange(start, min(start + ITEMS_PER_CHUNK, view.num_items))
        hidden = {name: view.hidden(rows, [name], dtype=view.dtypes[name])[name] for name in view.modalities}
        present = {name: view.present(name)[rows] for name in view.modalities}
        store.append(ids[rows], hidden, present, allow_bare=True)
    return store


def _remove(place: Path) -> None:
    """Remove a store. Its manifest goes first, so that an interruption does not leave an incomplete store."""
    (place / MANIFEST).unlink(missing_ok=True)
    if place.exists():
        shutil.rmtree(place)


def _existing(place: Path) -> HiddenStateStore | None:
    """Return the store in `place` after verifying it; None if there is none or its creation was interrupted.

    Raises:
        StoreError: the store is damaged.
    """
    if not (place / MANIFEST).exists():
        return None
    try:
        store = HiddenStateStore.open(place)
        store.verify()
    except StoreError as error:
        raise StoreError(
            f"the copy of conditioned hidden states is damaged: {error}. To create it again, remove {place} and run "
            "the same command"
        ) from error
    return store


def _ids(features: ItemFeatures) -> np.ndarray:
    """Return the items' ids, or their row numbers if they have none."""
    if isinstance(features, HiddenStateStore):
        return features.item_ids
    return np.array([str(row) for row in range(features.num_items)], dtype=object)
