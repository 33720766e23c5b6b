"""Where a trainer's hidden states lie: conditioned once, in memory or on disk, until the fit or the items change."""

import tempfile
from pathlib import Path

from xsmoe.encoders import ItemFeatures
from xsmoe.nn import XSMoE
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.out_of_memory import placing_memory
from xsmoe.stream.hidden_states.conditioned import ConditionedFeatures, conditioned
from xsmoe.stream.hidden_states.conditioned_store import Companion
from xsmoe.stream.hidden_states.device_cache import place


class Placement:
    """Holds hidden states for training steps.

    They lie on the device if they fit there (`place`). Otherwise they stay where they are, and conditioned ones are
    read from a companion store.

    Args:
        config: the device, and how much of its memory they may take.
        folder: of the companion store, if one is needed; None uses a temporary one.
    """

    def __init__(self, config: StreamConfig, folder: Path | None) -> None:
        self._config, self._folder = config, folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._placed: ItemFeatures | None = None
        self._state: tuple[int, tuple[str, ...]] | None = None

    def of(self, features: ItemFeatures, items: XSMoE) -> tuple[ItemFeatures, str | None]:
        """The hidden states where they lie, and what there is to say where they were placed anew.

        Raises:
            OutOfMemory: they do not fit onto the device, although `config.store_gib` allows what they take.
            StoreError: the companion store is damaged, or cannot be written.
            ValueError: a conditioned row exceeds its dtype.
        """
        state = features.num_items, items.conditioned()
        if self._placed is not None and self._state == state:
            return self._placed, None
        # Those of before need not lie there beside them.
        self._placed = None
        with placing_memory(self._config):
            placed, message = place(conditioned(features, items), items.modalities, self._config)
        if isinstance(placed, ConditionedFeatures):
            placed = Companion.open(self._companion(), placed)
        self._placed, self._state = placed, state
        return placed, message

    def close(self) -> None:
        """Remove the temporary folder, if there is one."""
        self._placed = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _companion(self) -> Path:
        if self._folder is not None:
            return self._folder
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="xsmoe-conditioned-")
        return Path(self._temporary.name)
