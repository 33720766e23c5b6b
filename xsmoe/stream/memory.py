"""What a stream has shown so far: who met which items, which items exist, were trained on, and are popular."""

import numpy as np

from xsmoe.data import History, WindowSplits


class StreamMemory:
    """Grows window by window, the training split first and the rest once the window is trained.

    Only interactions that pass the window's k-core filter count.
    """

    def __init__(self) -> None:
        self.history = History()
        self.known = np.empty(0, dtype=np.int64)
        self.trained = np.empty(0, dtype=np.int64)
        self._all_time = np.empty(0, dtype=np.int64)
        self._last = np.empty(0, dtype=np.int64)

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
        self.history.add(*splits.validation_pairs)
        items = splits.all_pairs[1]
        size = max(len(self._all_time), int(items.max(initial=-1)) + 1)
        self._last = np.bincount(items, minlength=size)
        self._all_time = np.pad(self._all_time, (0, size - len(self._all_time))) + self._last

    def known_with(self, splits: WindowSplits) -> np.ndarray:
        """All items up to and including a window that is about to be tested on, ascending."""
        return np.union1d(self.known, splits.all_pairs[1])

    def popularity(self, items: np.ndarray) -> dict[str, np.ndarray]:
        """Interactions of each item, float64, over all windows ("all_time") and the last one ("last_window")."""
        return {"all_time": _counts(self._all_time, items), "last_window": _counts(self._last, items)}


def _counts(counts: np.ndarray, items: np.ndarray) -> np.ndarray:
    found = np.zeros(len(items))
    inside = items < len(counts)
    found[inside] = counts[items[inside]]
    return found
