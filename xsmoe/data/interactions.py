"""The interaction log of a stream: user, item and time."""

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
        rows: (N,) int64, each interaction's data row in its source file, from 1. Default: 1 to N.
        notes: sentences about unusual content of the file and how it was handled.

    Raises:
        TypeError: timestamps or rows are not integers.
        ValueError: the arrays have different lengths, or the timestamps do not ascend.
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
        # A comparison, not the sign of a difference: differences of unsigned integers wrap.
        if (self.timestamps[1:] < self.timestamps[:-1]).any():
            raise ValueError("timestamps must ascend; build with Interactions.in_time_order(users, items, timestamps)")

    def __len__(self) -> int:
        return len(self.timestamps)

    @classmethod
    def in_time_order(cls, users: np.ndarray, items: np.ndarray, timestamps: np.ndarray) -> "Interactions":
        """Sort the rows by time. Rows with equal timestamps keep their order."""
        order = np.argsort(timestamps, kind="stable")
        return cls(users[order], items[order], timestamps[order], order + 1)


def read_interactions(
    path: str | PathLike[str], *, user: str = "user", item: str = "item", timestamp: str = "timestamp"
) -> Interactions:
    """Read a log of interactions from a `.csv` (with a header) or `.parquet` file.

    Every row of the file becomes one interaction. `notes` describes unusual content, such as another unit of time.

    Args:
        path: the file. Only the three named columns are read. A quote in another column must not hide a row.
        user, item: names of the columns with the ids, strings or integers; integers become strings.
        timestamp: name of the column with the time, integer seconds since 1970. Milliseconds, microseconds, nanoseconds
            and dates written as yyyymmdd are converted to seconds if the whole column is certainly in that unit. The
            rows may be in any order.

    Returns:
        The interactions in time order. Rows with equal times keep the file's order.

    Raises:
        DataError: the file is missing, empty or cannot be parsed; a column is missing; a row has no user or no item; a
            timestamp is not a whole number or is negative; timestamps have several units or are no plausible dates; a
            quoted field spans lines, or a quote is never closed. Data rows are counted from 1, without the header.
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
    """Return the columns of a file as interactions in time order.

    Args:
        path: the file, for error messages.
        columns: the file's columns.
        user, item, timestamp: the columns' names.
        rows: (N,) int64 row numbers; default 1 to N.
        notes: notes about the file. Notes about its times are added to them.

    Raises:
        DataError: a column has another type, a row has no id, or a timestamp is not a whole number, is negative, or has
            an uncertain unit.
    """
    users, items = id_strings(path, user, columns[user]), id_strings(path, item, columns[item])
    numbers = whole_numbers(path, timestamp, columns[timestamp])
    times, note = to_seconds(path, timestamp, numbers)
    # Sort by the file's own numbers: a finer unit orders interactions within one second.
    order = np.argsort(numbers, kind="stable")
    rows = order + 1 if rows is None else rows[order]
    return Interactions(users[order], items[order], times[order], rows, notes if note is None else (*notes, note))
