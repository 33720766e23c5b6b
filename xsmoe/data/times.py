"""Units of timestamps. A column with a certain unit is converted to seconds since 1970; an uncertain one is refused."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from xsmoe.data.errors import DataError

DAY = 86_400
_1971, _1990, _2100 = 31_536_000, 631_152_000, 4_102_444_800
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
# For each unit two ranges: 1971 to 1990 (old entries of a log), and 1990 to 2100. The ranges do not overlap.
_EDGES = np.array([[year * factor for year in (_1971, _1990, _2100)] for factor in UNITS.values()]).ravel()
_TICKS = (627_667_488_000_000_000, 662_380_416_000_000_000)
"""1990 to 2100 in units of 100 ns since the year 1. Read as nanoseconds since 1970, they are in 1989 and 1990."""
_ADVICE = "timestamps must be whole seconds since 1970 in every row: correct these rows, or convert the column"
_SHOWN = 3


def to_seconds(path: Path, name: str, values: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Convert a column of timestamps to whole seconds since 1970.

    Milliseconds, microseconds, nanoseconds and dates written as yyyymmdd are recognized if every value is between 1971
    and 2100 in that unit and at least half of the values are after 1990. Two kinds of columns stay unchanged: smaller
    numbers, such as counters, and seconds of which most are before 1990.

    Args:
        path, name: the file and the column, for messages.
        values: (N,) int64, at least 0, in the file's order.

    Returns:
        (N,) int64 seconds, and a note on the unit; None if the values are seconds from 1990 on.

    Raises:
        DataError: the values have several units, single values are far from the others, or no unit makes them dates.
    """
    groups = np.searchsorted(_EDGES, values, side="right")
    counts = np.bincount(groups, minlength=len(_EDGES) + 1)
    where = f"{path}: column '{name}'"
    # Group 0 is before 1971 in seconds. Then each unit has three groups: before 1990, from 1990 on, and no date.
    if counts[:2].sum() == len(values):
        return _small(where, values)
    for number, (unit, factor) in enumerate(UNITS.items()):
        before, after = counts[3 * number + 1], counts[3 * number + 2]
        if before + after < len(values):
            continue
        if 2 * after >= len(values):
            _refuse_lookalikes(where, unit, values)
            seconds = values // factor
            return seconds, None if factor == 1 else f"{where} holds {unit}; converted to {_span(seconds)}"
        if factor == 1:
            return values, f"{where} holds {_span(values)}, most of them before 1990; kept as it is"
    raise _doubt(where, values, groups, counts)


def differ_in_unit(first: int, second: int) -> bool:
    """Return whether one of two times in seconds is from 1990 on and the other before 1971, like days or minutes."""
    low, high = sorted((first, second))
    return low < _1971 and high >= _1990


def iso_day(seconds: int) -> str:
    """Return the date of a time in seconds since 1970, or the number itself beyond the year 9999."""
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=int(seconds))).date().isoformat()
    except OverflowError:
        return str(seconds)


def _small(where: str, values: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Convert numbers below 1990 in seconds: dates written as yyyymmdd, or counters, which stay unchanged."""
    seconds, valid = _dates(values)
    if valid.all():
        return seconds, f"{where} holds dates written as yyyymmdd; converted to {_span(seconds)}"
    if 2 * valid.sum() > len(values):
        raise DataError(f"{where} holds dates written as yyyymmdd, but {_rows(values, ~valid)}; {_ADVICE}")
    low, high = int(values.min()), int(values.max())
    return values, f"{where} goes from {low} to {high}, before 1990 if these are seconds; kept as it is"


def _dates(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the midnights of numbers read as yyyymmdd, in seconds, and which of them are dates from 1990 to 2099."""
    years, months, days = values // 10_000, values // 100 % 100, values % 100
    valid = (years >= 1990) & (years < 2100) & (months >= 1) & (months <= 12) & (days >= 1)
    count = np.where(valid, (years - 1970) * 12 + months - 1, 0)
    first, following = (
        months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) for months in (count, count + 1)
    )
    valid &= days <= following - first
    return (first + days - 1) * DAY, valid


def _refuse_lookalikes(where: str, unit: str, values: np.ndarray) -> None:
    """Raise DataError if another interpretation of the column is more likely than this unit."""
    low, high = int(values.min()), int(values.max())
    if unit == "nanoseconds" and _TICKS[0] <= low and high < _TICKS[1]:
        other = "units of 100 ns since the year 1"
    elif unit == "seconds" and low >= 1990_01_01_00 and (_dates(values // 100)[1] & (values % 100 < 24)).all():
        other = "dates written as yyyymmddhh"
    else:
        return
    raise DataError(
        f"{where} goes from {low} to {high}: {unit} since 1970, or {other}; convert it to seconds since 1970"
    )


def _doubt(where: str, values: np.ndarray, groups: np.ndarray, counts: np.ndarray) -> DataError:
    """Return the error for a column that is not in one unit as a whole."""
    # The kind of each group: 0 small numbers, 1 to 4 the units, 5 no date.
    kinds = np.array([0] + [kind for unit in range(len(UNITS)) for kind in (unit + 1, unit + 1, 5)])
    names = ["before 1971 if they are seconds", *UNITS, "no dates in any unit"]
    totals = np.bincount(kinds, weights=counts, minlength=len(names))
    most = int(totals.argmax())
    others = kinds[groups] != most
    if not others.any():
        low, high = int(values.min()), int(values.max())
        found = f"goes from {low} to {high}, which is between 1990 and 2100 in no unit"
        return DataError(f"{where} {found}; {_ADVICE}")
    return DataError(
        f"{where} mixes units: {int(totals[most])} of its {len(values)} values are {names[most]}, but "
        f"{_rows(values, others)}; {_ADVICE}"
    )


def _rows(values: np.ndarray, chosen: np.ndarray) -> str:
    places = np.flatnonzero(chosen)
    shown = ", ".join(f"data row {place + 1} holds {values[place]}" for place in places[:_SHOWN])
    return shown if len(places) <= _SHOWN else f"{shown}, and {len(places) - _SHOWN} more rows differ"


def _span(seconds: np.ndarray) -> str:
    return f"seconds, from {iso_day(int(seconds.min()))} to {iso_day(int(seconds.max()))}"
