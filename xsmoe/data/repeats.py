"""Repeated interactions within a log, and between a log and earlier logs."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from xsmoe.data.interactions import Interactions
from xsmoe.data.times import DAY

_FACTORS = (10**3, 10**6, 10**9)


@dataclass(frozen=True)
class LogSummary:
    """Counts of a log.

    Attributes:
        rows: interactions.
        users, items: distinct users and distinct items.
        duplicates: rows that repeat the user, item and time of another row.
        repeats: further rows whose user has the same item at another time too; one row of each such pair of user and
            item is not counted.
        shared_time: share of the rows, without the duplicates, whose user has another row with the same time.
        first, last: the times of the first and the last row.
    """

    rows: int
    users: int
    items: int
    duplicates: int
    repeats: int
    shared_time: float
    first: int
    last: int


def summarize_log(log: Interactions) -> LogSummary:
    """Count the repeated interactions of a log with at least one interaction."""
    users, items = factorize(log.users)[1], factorize(log.items)[1]
    kept = ~exact_duplicates(users, items, log.timestamps)
    pairs = np.sort(_pairs(users, items)[kept])
    who, when = users[kept], log.timestamps[kept]
    tied = _tied(when)
    order = tied[np.lexsort((who[tied], when[tied]))]
    shared = _either_side((np.diff(who[order]) == 0) & (np.diff(when[order]) == 0))
    return LogSummary(
        rows=len(log),
        users=int(users.max()) + 1,
        items=int(items.max()) + 1,
        duplicates=int((~kept).sum()),
        repeats=int((pairs[1:] == pairs[:-1]).sum()),
        shared_time=float(shared.sum() / len(when)),
        first=int(log.timestamps[0]),
        last=int(log.timestamps[-1]),
    )


def exact_duplicates(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return which interactions repeat the user, item and time of an earlier row, (N,) bool.

    Args:
        users, items: (N,) int64, at least 0.
        times: (N,) integers, ascending.
    """
    tied = _tied(times)
    found = np.zeros(len(times), bool)
    pairs = _pairs(users, items)[tied]
    order = np.lexsort((pairs, times[tied]))
    again = (np.diff(pairs[order]) == 0) & (np.diff(times[tied][order]) == 0)
    found[tied[order[1:][again]]] = True
    return found


def seen_before(log: Interactions, before: Interactions) -> np.ndarray:
    """Return which interactions of a log are in an earlier log too, (N,) bool, in any unit of time.

    Times are compared unchanged. If all times of either log are midnights, they are compared as days too. If all times
    of one log are multiples of a thousand, a million or a billion, they are compared without that factor too.
    """
    users = factorize(np.concatenate([before.users, log.users]))[1]
    items = factorize(np.concatenate([before.items, log.items]))[1]
    pairs = _pairs(users, items)
    old, new = pairs[: len(before)], pairs[len(before) :]
    known = np.flatnonzero(np.isin(new, old))
    kept = np.isin(old, new[known])
    old, old_times = old[kept], before.timestamps[kept]
    new, new_times = new[known], log.timestamps[known]
    found = _match(new, new_times, old, old_times)
    if _whole(log.timestamps, DAY) or _whole(before.timestamps, DAY):
        found |= _match(new, new_times // DAY, old, old_times // DAY)
    for factor in _FACTORS:
        if _whole(log.timestamps, factor):
            found |= _match(new, new_times // factor, old, old_times)
        if _whole(before.timestamps, factor):
            found |= _match(new, new_times, old, old_times // factor)
    seen = np.zeros(len(log), bool)
    seen[known] = found
    return seen


def factorize(names: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the distinct names in order of first appearance, and each name's index among them, int64."""
    encoded = pa.array(names, pa.string()).dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _tied(times: np.ndarray) -> np.ndarray:
    """Return the indices of times that occur more than once. The times ascend."""
    return np.flatnonzero(_either_side(np.diff(times) == 0))


def _either_side(same: np.ndarray) -> np.ndarray:
    """Return which of N values are next to a marked step; `same` (N - 1,) marks steps between neighbours."""
    return np.concatenate([same, [False]]) | np.concatenate([[False], same])


def _pairs(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    return users * (int(items.max(initial=0)) + 1) + items


def _whole(times: np.ndarray, factor: int) -> bool:
    """Return whether all times are multiples of a factor and at least one is not zero."""
    return bool((times % factor == 0).all() and times.any())


def _match(pairs: np.ndarray, times: np.ndarray, old_pairs: np.ndarray, old_times: np.ndarray) -> np.ndarray:
    def keys(pairs: np.ndarray, times: np.ndarray) -> np.ndarray:
        columns = np.ascontiguousarray(np.stack([pairs, times.astype(np.int64)], axis=1), "<i8")
        return columns.view([("pair", "<i8"), ("time", "<i8")])[:, 0]

    return np.isin(keys(pairs, times), keys(old_pairs, old_times))
