"""Cache of all hidden states on the device, so that steps copy none from the host."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from xsmoe.encoders import ItemFeatures
from xsmoe.encoders.features import FeatureView, row_indices, select_modalities

ITEMS_PER_CHUNK = 4096


class DeviceCachedFeatures(FeatureView):
    """`ItemFeatures` of some modalities whose hidden states are copied to a device and gathered there.

    All values are bitwise equal to those of the source.

    Args:
        features: the source; must not change after the copy.
        modalities: modalities to copy.
        device: device of the results of `hidden`.
    """

    def __init__(self, features: ItemFeatures, modalities: Sequence[str], device: torch.device) -> None:
        super().__init__(features, modalities)
        self._device = device
        self._num_items = features.num_items
        self._constant = {name: constant_levels(features, name) for name in self._modalities}
        self._complete = {name: bool(features.present(name).all()) for name in self._modalities}
        self._present = {
            name: torch.from_numpy(np.array(features.present(name))).to(device) for name in self._modalities
        }
        self._tables = {name: self._table(name) for name in self._modalities}

    def _table(self, name: str) -> list[Tensor]:
        """Return a modality's levels, (num_items, D) each, or (1, D) where all items share the row."""
        dtype, dim = self._features.dtypes[name], self._features.dims[name]
        constant = self._constant[name]
        levels = [
            constant[place].to(self._device)
            if place in constant
            else torch.empty(self._num_items, dim, dtype=dtype, device=self._device)
            for place in range(self._features.num_levels)
        ]
        for start in range(0, self._num_items, ITEMS_PER_CHUNK):
            rows = np.arange(start, min(start + ITEMS_PER_CHUNK, self._num_items))
            found = self._features.hidden(rows, [name], dtype=dtype)[name]
            for place, level in enumerate(levels):
                if place not in constant:
                    level[start : start + len(rows)].copy_(found[place])
        return levels

    @property
    def num_items(self) -> int:
        return self._num_items

    def hidden(
        self, items: np.ndarray | Tensor, modalities: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, list[Tensor]]:
        """Return hidden states on the device; see `ItemFeatures.hidden`."""
        rows = row_indices(items, self._num_items)
        names = select_modalities(modalities, self._modalities)
        index = torch.from_numpy(rows).to(self._device, non_blocking=True)
        return self.gather(index, self.complete(rows, names), dtype)

    def complete(self, rows: np.ndarray, modalities: Sequence[str]) -> dict[str, bool]:
        """Return for each modality whether all of some items have it. This determines the shapes of their levels."""
        return {name: self._complete[name] or bool(self._features.present(name)[rows].all()) for name in modalities}

    def gather(self, index: Tensor, complete: Mapping[str, bool], dtype: torch.dtype) -> dict[str, list[Tensor]]:
        """Gather the hidden states of items whose rows are on the device, without synchronizing.

        Args:
            index: (N,) int64 on the device, rows in [0, num_items).
            complete: result of `complete` for these items.
            dtype: dtype of the result.
        """
        hidden = {}
        for name, whole in complete.items():
            levels = []
            for place, table in enumerate(self._tables[name]):
                if place not in self._constant[name]:
                    levels.append(table.index_select(0, index).to(dtype))
                elif whole:
                    levels.append(table.to(dtype))
                else:
                    levels.append(table.to(dtype) * self._present[name][index][:, None].to(dtype))
            hidden[name] = levels
        return hidden


def constant_levels(features: ItemFeatures, modality: str) -> dict[int, Tensor]:
    """Return the levels whose row all items share, (1, D) each, by their position."""
    having = np.flatnonzero(features.present(modality))
    if not len(having):
        return {}
    # For two equal items there are two rows, unless the level has only one.
    levels = features.hidden(having[[0, 0]], [modality], dtype=features.dtypes[modality])[modality]
    return {place: level for place, level in enumerate(levels) if level.shape[0] == 1}
