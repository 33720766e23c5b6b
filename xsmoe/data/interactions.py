"""The log that a stream is made of: who took what, and when."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa

from xsmoe.data.tables import id_strings, read_columns, seconds


@dataclass(frozen=True)
class Interactions:
    """Interactions in time order.

    Attributes:
        users: (N,) object array of str.
        items: (N,) object array of str.
        timestamps: (N,) int64, whole seconds since 1970, ascending.

    Raises:
        TypeError: timestamps that are not integers.
        ValueError: arrays of different lengths, or timestamps that do not ascend.
    """

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray

    def __post_init__(self) -> None:
        lengths = {len(self.users), len(self.items), len(self.timestamps)}
        if len(lengths) > 1:
            raise ValueError(
                f"users, items and timestamps must have one length, not {len(self.users)}, {len(self.items)} "
                f"and {len(self.timestamps)}"
            )
        if self.timestamps.dtype.kind not in "iu":
            raise TypeError(f"timestamps must be integers, whole seconds since 1970, not {self.timestamps.dtype}")
        # Not the sign of a difference, which wraps where the type is unsigned.
        if (self.timestamps[1:] < self.timestamps[:-1]).any():
            raise ValueError("timestamps must ascend; build with Interactions.in_time_order(users, items, timestamps)")

    def __len__(self) -> int:
        return len(self.timestamps)

    @classmethod
    def in_time_order(cls, users: np.ndarray, items: np.ndarray, timestamps: np.ndarray) -> "Interactions":
        """Sorts the rows by time; rows of one timestamp stay in the order given."""
        order = np.argsort(timestamps, kind="stable")
        return cls(users[order], items[order], timestamps[order])


def read_interactions(
    path: str | PathLike[str], *, user: str = "user", item: str = "item", timestamp: str = "timestamp"
) -> Interactions:
    """Reads a log of interactions from a `.csv` (with a header) or `.parquet` file.

    Args:
        path: the file; columns other than the three named are not looked at.
        user, item: names of the columns with the ids, strings or integers; integers become strings.
        timestamp: name of the column with the time, integer seconds since 1970. A CSV file may be in any order.

    Returns:
        The interactions in time order; rows of one timestamp stay in the file's order.

    Raises:
        DataError: a file that is missing, empty or cannot be parsed; a missing column; a row without a user or an item;
            a timestamp that is no whole number or is negative. Data rows count from 1, without the header.
    """
    path = Path(path)
    arguments = {user: "user", item: "item", timestamp: "timestamp"}
    advice = {
        name: f"Rename it, or name the right one with {argument}= (--{argument}-column of `xsmoe prepare table`)."
        for name, argument in arguments.items()
    }
    columns = read_columns(path, advice)
    return parse_interactions(path, columns, user=user, item=item, timestamp=timestamp)


def parse_interactions(
    path: Path, columns: Mapping[str, pa.ChunkedArray], *, user: str, item: str, timestamp: str
) -> Interactions:
    """The columns of a file as interactions in time order; the names are theirs, the path is for messages.

    Raises:
        DataError: a column of another type, a row without an id, a timestamp that is no whole number or is negative.
    """
    return Interactions.in_time_order(
        id_strings(path, user, columns[user]),
        id_strings(path, item, columns[item]),
        seconds(path, timestamp, columns[timestamp]),
    )
