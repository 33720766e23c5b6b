"""A stream's windows: stretches of the log with equally many interactions."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A stretch of the stream.

    Attributes:
        number: its place in the stream, from 0.
        users, items: (N,) int64 ids of the interactions, in time order.
        timestamps: (N,) int64, whole seconds since 1970.

    Raises:
        TypeError: an array of another dtype.
        ValueError: an array of another rank or length.
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
    """The places of interactions in time order, (N,) int64.

    Args:
        timestamps: (N,) int64 seconds.
        string_sort: sort timestamps as strings of digits, as the published code does.
        ties: (N,) values that interactions of one timestamp are sorted by; None keeps them in the order given, but with
            `string_sort`, which is not stable then.
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
        num_windows: at least 2, since a window is tested on the next one. Where N is no multiple of it, the first
            windows have one interaction more.
        string_sort, ties: as for `time_order`. By default interactions of one timestamp stay in the order given; a sort
            as strings is there to compare with the published numbers.

    Raises:
        TypeError: arrays that are not int64.
        ValueError: arrays of different lengths, no interactions, fewer than 2 windows, or more windows than
            interactions.
    """
    log = Window(0, users, items, timestamps)
    if num_windows < 2:
        raise ValueError(f"num_windows must be at least 2, to train on one and test on the next, not {num_windows}")
    if len(log) < num_windows:
        raise ValueError(f"num_windows is {num_windows}, but there are only {len(log)} interactions; ask for fewer")
    order = time_order(timestamps, string_sort=string_sort, ties=ties)
    return [
        Window(number, users[part], items[part], timestamps[part])
        for number, part in enumerate(np.array_split(order, num_windows))
    ]
