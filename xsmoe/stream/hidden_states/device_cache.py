"""Hidden states that lie on the device as a whole, where its memory allows, so that no step copies any."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from xsmoe.encoders import ItemFeatures
from xsmoe.encoders.features import FeatureView, row_indices, select_modalities
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.hidden_states.conditioned import ConditionedFeatures
from xsmoe.stream.resources import available_memory

GIB = 1 << 30
ITEMS_A_CHUNK = 4096
SHARE_OF_FREE = 0.25
"""Of the device's free memory, what the hidden states may take unless the user says otherwise. On a CPU this holds for
conditioned hidden states only: others are in the memory of the host already, as far as they are used."""


class ResidentFeatures(FeatureView):
    """`ItemFeatures` of some modalities whose hidden states were copied to a device and are gathered there.

    They are the same numbers, to the bit, as those of the features that they were copied from.

    Args:
        features: where they come from; must not change any more.
        modalities: those that are wanted.
        device: where `hidden` gives them out.
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
        """A modality's levels, (num_items, D) each, or (1, D) where all items share the row."""
        dtype, dim = self._features.dtypes[name], self._features.dims[name]
        constant = self._constant[name]
        levels = [
            constant[place].to(self._device)
            if place in constant
            else torch.empty(self._num_items, dim, dtype=dtype, device=self._device)
            for place in range(self._features.num_levels)
        ]
        for start in range(0, self._num_items, ITEMS_A_CHUNK):
            rows = np.arange(start, min(start + ITEMS_A_CHUNK, self._num_items))
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
        """As `ItemFeatures.hidden` says, but on the device."""
        rows = row_indices(items, self._num_items)
        names = select_modalities(modalities, self._modalities)
        index = torch.from_numpy(rows).to(self._device, non_blocking=True)
        return self.gather(index, self.complete(rows, names), dtype)

    def complete(self, rows: np.ndarray, modalities: Sequence[str]) -> dict[str, bool]:
        """For each modality whether all of some items have it, which decides about the shapes of their levels."""
        return {name: self._complete[name] or bool(self._features.present(name)[rows].all()) for name in modalities}

    def gather(self, index: Tensor, complete: Mapping[str, bool], dtype: torch.dtype) -> dict[str, list[Tensor]]:
        """The hidden states of items whose rows are known on the device only; nothing here waits for it.

        Args:
            index: (N,) int64 on the device, rows in [0, num_items).
            complete: what the method of that name says of them.
            dtype: of the result.
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


def place(features: ItemFeatures, modalities: Sequence[str], config: StreamConfig) -> tuple[ItemFeatures, str | None]:
    """The features, on the configuration's device if they fit into what it allows, and what there is to say if not.

    Args:
        features: the items' hidden states.
        modalities: those that the model encodes.
        config: the device, and how much of its memory they may take.
    """
    device = torch.device(config.device)
    conditioned = isinstance(features, ConditionedFeatures)
    allowed = _allowed(config, device, conditioned)
    if not allowed:
        return features, None
    needed = resident_bytes(features, modalities)
    if needed <= allowed:
        return ResidentFeatures(features, modalities, device), None
    free = "free" if device.type == "cuda" else "available"
    origin = "store_gib" if config.store_gib is not None else f"a quarter of what is {free} on {device} (store_gib)"
    instead = "conditioned rows are kept on disk, and " if conditioned else ""
    return features, (
        f"the items' hidden states take {needed / GIB:.2f} GiB and {origin} allows {allowed / GIB:.2f}: {instead}every "
        "step copies its rows from the host"
    )


def resident_bytes(features: ItemFeatures, modalities: Sequence[str]) -> int:
    """What the items' hidden states take on a device."""
    total = 0
    for name in modalities:
        constant = len(constant_levels(features, name))
        rows = (features.num_levels - constant) * features.num_items + constant
        total += rows * features.dims[name] * features.dtypes[name].itemsize
    return total


def _allowed(config: StreamConfig, device: torch.device, conditioned: bool) -> int:
    if config.store_gib is not None:
        return int(config.store_gib * GIB)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE)
    return int(available_memory() * SHARE_OF_FREE) if conditioned else 0


def constant_levels(features: ItemFeatures, modality: str) -> dict[int, Tensor]:
    """The levels whose row all items share, (1, D) each, by their place."""
    having = np.flatnonzero(features.present(modality))
    if not len(having):
        return {}
    # Asked for twice, an item has two rows unless the level is given out once.
    levels = features.hidden(having[[0, 0]], [modality], dtype=features.dtypes[modality])[modality]
    return {place: level for place, level in enumerate(levels) if level.shape[0] == 1}
