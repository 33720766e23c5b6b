"""The log that a stream is made of: who took what, and when."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa

from xsmoe.data.tables import id_strings, read_table, whole_numbers
from xsmoe.data.times import to_seconds


@dataclass(frozen=True)
class Interactions:
    """Interactions in time order.

    Attributes:
        users: (N,) object array of str.
        items: (N,) object array of str.
        timestamps: (N,) int64, whole seconds since 1970, ascending.
        rows: (N,) int64, each one's data row in the file that it came from, from 1. Left out, they count from 1.
        notes: sentences about what was unusual in the file, and what was done about it.

    Raises:
        TypeError: timestamps or rows that are not integers.
        ValueError: arrays of different lengths, or timestamps that do not ascend.
    """

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.rows):
            object.__setattr__(self, "rows", np.arange(1, len(self.timestamps) + 1))
        lengths = {len(self.users), len(self.items), len(self.timestamps)}
        if len(lengths) > 1:
            raise ValueError(
                f"users, items and timestamps must have one length, not {len(self.users)}, {len(self.items)} "
                f"and {len(self.timestamps)}"
            )
        if self.rows.shape != (len(self.timestamps),):
            raise ValueError(f"rows must have shape ({len(self.timestamps)},), not {self.rows.shape}")
        for name in ("timestamps", "rows"):
            array = getattr(self, name)
            if array.dtype.kind not in "iu":
                meaning = "whole seconds since 1970" if name == "timestamps" else "numbers of data rows"
                raise TypeError(f"{name} must be integers, {meaning}, not {array.dtype}")
        # Not the sign of a difference, which wraps where the type is unsigned.
        if (self.timestamps[1:] < self.timestamps[:-1]).any():
            raise ValueError("timestamps must ascend; build with Interactions.in_time_order(users, items, timestamps)")

    def __len__(self) -> int:
        return len(self.timestamps)

    @classmethod
    def in_time_order(cls, users: np.ndarray, items: np.ndarray, timestamps: np.ndarray) -> "Interactions":
        """Sort the rows by time; rows of one timestamp stay in the order given."""
        order = np.argsort(timestamps, kind="stable")
        return cls(users[order], items[order], timestamps[order], order + 1)


def read_interactions(
    path: str | PathLike[str], *, user: str = "user", item: str = "item", timestamp: str = "timestamp"
) -> Interactions:
    """Read a log of interactions from a `.csv` (with a header) or `.parquet` file.

    Every row of the file is an interaction of the result. What was unusual, such as another unit of time, is in
    `notes`.

    Args:
        path: the file. Columns other than the three named are not read, but no quote in them may hide a row.
        user, item: names of the columns with the ids, strings or integers; integers become strings.
        timestamp: name of the column with the time, integer seconds since 1970. Milliseconds, microseconds, nanoseconds
            and dates written as yyyymmdd become seconds where the whole column is in that unit beyond doubt. The rows
            may be in any order.

    Returns:
        The interactions in time order; rows of one time stay in the file's order.

    Raises:
        DataError: a file that is missing, empty or cannot be parsed; a missing column; a row without a user or an item;
            a timestamp that is no whole number or is negative; timestamps of several units or far from any date; a
            quoted field that spans lines, or a quote without an end. Data rows count from 1, without the header.
    """
    path = Path(path)
    arguments = {user: "user", item: "item", timestamp: "timestamp"}
    advice = {
        name: f"Rename it, or name the right one with {argument}= (--{argument}-column of `xsmoe prepare table`)."
        for name, argument in arguments.items()
    }
    table = read_table(path, advice, digits=timestamp)
    return parse_interactions(path, table.columns, user=user, item=item, timestamp=timestamp, notes=table.notes)


def parse_interactions(
    path: Path,
    columns: Mapping[str, pa.ChunkedArray],
    *,
    user: str,
    item: str,
    timestamp: str,
    rows: np.ndarray | None = None,
    notes: tuple[str, ...] = (),
) -> Interactions:
    """The columns of a file as interactions in time order; the names are theirs, the path is for messages.

    Args:
        path, columns, user, item, timestamp: the file, its columns and their names.
        rows: (N,) int64 numbers of rows; default the positions in the columns, from 1.
        notes: about the file, to which those about its times are added.

    Raises:
        DataError: a column of another type, a row without an id, a timestamp that is no whole number, is negative, or
            is in no unit that is beyond doubt.
    """
    users, items = id_strings(path, user, columns[user]), id_strings(path, item, columns[item])
    numbers = whole_numbers(path, timestamp, columns[timestamp])
    times, note = to_seconds(path, timestamp, numbers)
    # By the numbers of the file: a finer unit orders what happened within a second.
    order = np.argsort(numbers, kind="stable")
    rows = order + 1 if rows is None else rows[order]
    return Interactions(users[order], items[order], times[order], rows, notes if note is None else (*notes, note))
