"""Windows of a stream: consecutive parts of the log with equally many interactions."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A window of the stream.

    Attributes:
        number: its position in the stream, from 0.
        users, items: (N,) int64 ids of the interactions, in time order.
        timestamps: (N,) int64, whole seconds since 1970.

    Raises:
        TypeError: an array has another dtype.
        ValueError: an array has another rank or length.
    """

    number: int
    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray

    def __post_init__(self) -> None:
        for name in ("users", "items", "timestamps"):
            array = getattr(self, name)
            if array.dtype != np.int64:
                raise TypeError(f"{name} must be int64, not {array.dtype}")
            if array.shape != (len(self.users),):
                raise ValueError(f"{name} must have shape ({len(self.users)},) as users has, not {array.shape}")

    def __len__(self) -> int:
        return len(self.users)


def time_order(timestamps: np.ndarray, *, string_sort: bool = False, ties: np.ndarray | None = None) -> np.ndarray:
    """Return the indices that sort interactions by time, (N,) int64.

    Args:
        timestamps: (N,) int64 seconds.
        string_sort: sort timestamps as strings of digits, as the published code does.
        ties: (N,) sort keys for interactions with equal timestamps. None keeps their order; with `string_sort` the sort
            is not stable then.
    """
    keys = timestamps.astype(str) if string_sort else timestamps
    if ties is not None:
        return np.lexsort((ties, keys))
    return np.argsort(keys) if string_sort else np.argsort(keys, kind="stable")


def make_windows(
    users: np.ndarray,
    items: np.ndarray,
    timestamps: np.ndarray,
    num_windows: int,
    *,
    string_sort: bool = False,
    ties: np.ndarray | None = None,
) -> list[Window]:
    """Cut interactions, sorted by time, into windows of equal count (arXiv 2508.05993).

    Args:
        users, items: (N,) int64 ids.
        timestamps: (N,) int64 seconds.
        num_windows: at least 2, because each model is tested on the next window. If N is not a multiple of it, the
            first windows have one more interaction.
        string_sort, ties: see `time_order`. By default, interactions with equal timestamps keep their order. Use
            `string_sort` only to compare with the published numbers.

    Raises:
        TypeError: an array is not int64.
        ValueError: the arrays have different lengths, there are no interactions, or num_windows is below 2 or above the
            number of interactions.
    """
    log = Window(0, users, items, timestamps)
    if num_windows < 2:
        raise ValueError(f"num_windows must be at least 2 (train on one, test on the next), not {num_windows}")
    if len(log) < num_windows:
        raise ValueError(f"num_windows is {num_windows}, but there are only {len(log)} interactions; use fewer windows")
    order = time_order(timestamps, string_sort=string_sort, ties=ties)
    return [
        Window(number, users[part], items[part], timestamps[part])
        for number, part in enumerate(np.array_split(order, num_windows))
    ]
