"""Placement of a trainer's hidden states: in a device cache, on disk, or where they are."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from xsmoe.encoders import ItemFeatures
from xsmoe.nn import XSMoE
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.out_of_memory import explain_placement_oom
from xsmoe.stream.hidden_states.conditioned import ConditionedFeatures, conditioned
from xsmoe.stream.hidden_states.conditioned_store import ConditionedStore
from xsmoe.stream.hidden_states.device_cache import DeviceCachedFeatures, constant_levels
from xsmoe.stream.resources import available_memory

GIB = 1 << 30
SHARE_OF_FREE = 0.25
"""Default limit of the device cache, as a share of the device's free memory. On a CPU only conditioned hidden states
are cached: all others are in the host's memory already, as far as they are used."""


class Placement:
    """Provides hidden states to training steps.

    They are cached on the device if they fit there (see `place`). Otherwise they stay where they are, and conditioned
    ones are read from a `ConditionedStore`. They are placed again only if the conditioning or the items change.

    Args:
        config: the device, and the memory limit of the cache.
        folder: folder of the conditioned store; None uses a temporary one.
    """

    def __init__(self, config: StreamConfig, folder: Path | None) -> None:
        self._config, self._folder = config, folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._placed: ItemFeatures | None = None
        self._state: tuple[int, tuple[str, ...]] | None = None

    def of(self, features: ItemFeatures, items: XSMoE) -> tuple[ItemFeatures, str | None]:
        """Return the placed hidden states, and a message for the user if they were placed again but do not fit.

        Raises:
            OutOfMemory: they do not fit on the device, although `config.store_gib` allows their size.
            StoreError: the conditioned store is damaged, or cannot be written.
            ValueError: a conditioned row exceeds its dtype.
        """
        state = features.num_items, items.conditioned()
        if self._placed is not None and self._state == state:
            return self._placed, None
        # Free the previous cache before the next one is allocated.
        self._placed = None
        with explain_placement_oom(self._config):
            placed, message = place(conditioned(features, items), items.modalities, self._config)
        if isinstance(placed, ConditionedFeatures):
            placed = ConditionedStore.open(self._store_folder(), placed)
        self._placed, self._state = placed, state
        return placed, message

    def close(self) -> None:
        """Remove the temporary folder, if there is one."""
        self._placed = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _store_folder(self) -> Path:
        if self._folder is not None:
            return self._folder
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="xsmoe-conditioned-")
        return Path(self._temporary.name)


def place(features: ItemFeatures, modalities: Sequence[str], config: StreamConfig) -> tuple[ItemFeatures, str | None]:
    """Cache the features on the device if they fit into the limit; else return them unchanged with a message.

    Args:
        features: the items' hidden states.
        modalities: modalities of the model.
        config: the device, and the memory limit of the cache.
    """
    device = torch.device(config.device)
    is_conditioned = isinstance(features, ConditionedFeatures)
    limit = _limit(config, device, is_conditioned)
    if not limit:
        return features, None
    needed = cached_bytes(features, modalities)
    if needed <= limit:
        return DeviceCachedFeatures(features, modalities, device), None
    free = "free" if device.type == "cuda" else "available"
    origin = "store_gib" if config.store_gib is not None else f"a quarter of the {free} memory of {device} (store_gib)"
    instead = "conditioned rows are kept on disk, and " if is_conditioned else ""
    return features, (
        f"the items' hidden states need {needed / GIB:.2f} GiB, but {origin} allows {limit / GIB:.2f} GiB: {instead}"
        "every step copies its rows from the host"
    )


def cached_bytes(features: ItemFeatures, modalities: Sequence[str]) -> int:
    """Return the size of the items' hidden states in a device cache, in bytes."""
    total = 0
    for name in modalities:
        constant = len(constant_levels(features, name))
        rows = (features.num_levels - constant) * features.num_items + constant
        total += rows * features.dims[name] * features.dtypes[name].itemsize
    return total


def _limit(config: StreamConfig, device: torch.device, is_conditioned: bool) -> int:
    if config.store_gib is not None:
        return int(config.store_gib * GIB)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE)
    return int(available_memory() * SHARE_OF_FREE) if is_conditioned else 0
