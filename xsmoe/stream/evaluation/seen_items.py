"""Seen-item history of a stream: each user's items, the known items, the trained items, and popularity."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xsmoe.data import History, WindowSplits, whole_sequences
from xsmoe.data.sequences import Pairs


class Validation(NamedTuple):
    """Validation split of the last window.

    Attributes:
        pairs: its interactions (users, items), in time order.
        history: items that its users have seen before it.
        seconds: duration of the window, at least 1.
    """

    pairs: Pairs
    history: History
    seconds: int


class SeenItemHistory:
    """Interactions of all windows so far. A window's validation split is added only after training on the window.

    Only interactions that pass the window's k-core filter count. The item and the time of every interaction are stored,
    16 bytes each, because each window may choose another half-life of decayed popularity.

    Attributes:
        history: items that each user has seen.
        known: (K,) int64, all items so far, ascending.
        trained: (R,) int64, all items that were trained on, ascending.
        validation: validation split of the last window; None before the first window.
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
        """Add a whole window that the model was trained on."""
        self.add_training(splits)
        self.add_validation(splits)

    def add_training(self, splits: WindowSplits) -> None:
        """Add a window's training split, before training on the window."""
        self.history.add(*splits.train_pairs)
        self.known = np.union1d(self.known, splits.all_pairs[1])
        self.trained = np.union1d(self.trained, splits.train.items)

    def add_validation(self, splits: WindowSplits) -> None:
        """Add a window's validation split, after training on the window."""
        times = splits.all_times
        seconds = max(1, int(times.max() - times.min())) if len(times) else 1
        self.validation = Validation(splits.validation_pairs, self._history_of(splits.validation_pairs), seconds)
        self.history.add(*splits.validation_pairs)
        items = splits.all_pairs[1]
        size = max(len(self._all_time), int(items.max(initial=-1)) + 1)
        self._last = np.bincount(items, minlength=size)
        self._all_time = np.pad(self._all_time, (0, size - len(self._all_time))) + self._last
        self._items.append(items)
        self._times.append(times)

    def known_with(self, splits: WindowSplits) -> np.ndarray:
        """Return all items up to and including a test window, ascending."""
        return np.union1d(self.known, splits.all_pairs[1])

    def popularity(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """Count each item's interactions, float64, in all windows ("all_time") and in the last one ("last_window")."""
        return {"all_time": _counts(self._all_time, items), "last_window": _counts(self._last, items)}

    def decayed(
        self, items: np.ndarray, half_lives: Sequence[float], *, before_validation: bool = False
    ) -> list[np.ndarray]:
        """Sum the weights of each item's interactions. Weights decay exponentially with age.

        Args:
            items: (C,) int64, the items.
            half_lives: in seconds, above 0. With infinity all interactions have the weight 1.
            before_validation: whether to leave out the last window's validation split.

        Returns:
            For each half-life the sums (C,) float64.
        """
        seen = np.concatenate([np.empty(0, np.int64), *self._items])
        times = np.concatenate([np.empty(0, np.int64), *self._times])
        if before_validation and self.validation is not None:
            kept = len(seen) - len(self.validation.pairs[0])
            seen, times = seen[:kept], times[:kept]
        age = (times.max(initial=np.iinfo(np.int64).min) - times).astype(np.float64)
        return [_counts(np.bincount(seen, weights=np.exp2(-age / half_life)), items) for half_life in half_lives]

    def _history_of(self, pairs: Pairs) -> History:
        """Return the part of the history of users who have a sequence among these interactions."""
        users = whole_sequences(pairs).users
        values, offsets = self.history.of(users)
        part = History()
        part.add(np.repeat(users, np.diff(offsets)), values)
        return part


def _counts(counts: np.ndarray, items: np.ndarray) -> np.ndarray:
    found = np.zeros(len(items))
    inside = items < len(counts)
    found[inside] = counts[items[inside]]
    return found
