"""What a stream has shown so far: who met which items, which items exist, were trained on, and are popular."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xsmoe.data import History, WindowSplits, whole_sequences
from xsmoe.data.sequences import Pairs


class Validation(NamedTuple):
    """The last window's validation split, for choices that are made on it.

    Attributes:
        pairs: its interactions (users, items), in time order.
        history: what its users met before it.
        seconds: how long the window lasted, at least 1.
    """

    pairs: Pairs
    history: History
    seconds: int


class StreamMemory:
    """Grows window by window, the training split first and the rest once the window is trained.

    Only interactions that pass the window's k-core filter count. The item and the time of every interaction are kept,
    16 bytes each, because the half-life of decayed popularity may be another one after every window.

    Attributes:
        validation: the last window's validation split; None before the first window.
    """

    def __init__(self) -> None:
        self.history = History()
        self.known = np.empty(0, dtype=np.int64)
        self.trained = np.empty(0, dtype=np.int64)
        self.validation: Validation | None = None
        self._all_time = np.empty(0, dtype=np.int64)
        self._last = np.empty(0, dtype=np.int64)
        self._items: list[np.ndarray] = []
        self._times: list[np.ndarray] = []

    def add(self, splits: WindowSplits) -> None:
        """Takes in a whole window that was trained on before."""
        self.add_training(splits)
        self.add_rest(splits)

    def add_training(self, splits: WindowSplits) -> None:
        """Takes in a window's training split, before the window is trained on."""
        self.history.add(*splits.train_pairs)
        self.known = np.union1d(self.known, splits.all_pairs[1])
        self.trained = np.union1d(self.trained, splits.train.items)

    def add_rest(self, splits: WindowSplits) -> None:
        """Takes in a window's validation split, after the window was trained on."""
        times = splits.all_times
        seconds = max(1, int(times.max() - times.min())) if len(times) else 1
        self.validation = Validation(splits.validation_pairs, self._met_by_users_of(splits.validation_pairs), seconds)
        self.history.add(*splits.validation_pairs)
        items = splits.all_pairs[1]
        size = max(len(self._all_time), int(items.max(initial=-1)) + 1)
        self._last = np.bincount(items, minlength=size)
        self._all_time = np.pad(self._all_time, (0, size - len(self._all_time))) + self._last
        self._items.append(items)
        self._times.append(times)

    def known_with(self, splits: WindowSplits) -> np.ndarray:
        """All items up to and including a window that is about to be tested on, ascending."""
        return np.union1d(self.known, splits.all_pairs[1])

    def popularity(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """Interactions of each item, float64, over all windows ("all_time") and the last one ("last_window")."""
        return {"all_time": _counts(self._all_time, items), "last_window": _counts(self._last, items)}

    def decayed(
        self, items: np.ndarray, half_lives: Sequence[float], *, before_validation: bool = False
    ) -> list[np.ndarray]:
        """Count interactions with a weight that halves with age, up to the latest interaction.

        Args:
            items: (C,) int64, for which to count.
            half_lives: in seconds, above 0; infinity gives all the weight 1.
            before_validation: whether to leave out the last window's validation split.

        Returns:
            For each half-life the weights (C,) float64.
        """
        taken = np.concatenate([np.empty(0, np.int64), *self._items])
        times = np.concatenate([np.empty(0, np.int64), *self._times])
        if before_validation and self.validation is not None:
            kept = len(taken) - len(self.validation.pairs[0])
            taken, times = taken[:kept], times[:kept]
        age = (times.max(initial=np.iinfo(np.int64).min) - times).astype(np.float64)
        return [_counts(np.bincount(taken, weights=np.exp2(-age / half_life)), items) for half_life in half_lives]

    def _met_by_users_of(self, pairs: Pairs) -> History:
        """The part of the history that belongs to users with a sequence among these interactions."""
        users = whole_sequences(pairs).users
        values, offsets = self.history.of(users)
        met = History()
        met.add(np.repeat(users, np.diff(offsets)), values)
        return met


def _counts(counts: np.ndarray, items: np.ndarray) -> np.ndarray:
    found = np.zeros(len(items))
    inside = items < len(counts)
    found[inside] = counts[items[inside]]
    return found
