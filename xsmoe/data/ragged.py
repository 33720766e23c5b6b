"""Ragged rows in NumPy: concatenated values, and the offset of each row."""

import numpy as np

Ragged = tuple[np.ndarray, np.ndarray]
"""Values (S,) and offsets (B + 1,): row b is `values[offsets[b]:offsets[b + 1]]`."""


def gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
    """Return the rows `values[starts[b]:starts[b] + lengths[b]]` of an array, starts and lengths (B,) int64."""
    offsets = offsets_of(lengths)
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return values[places], offsets


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return the offsets (B + 1,) int64 of rows of these lengths (B,)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def row_of(offsets: np.ndarray) -> np.ndarray:
    """Return the row (S,) int64 that each value belongs to."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def find(sorted_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the index of each id in an ascending array of ids, -1 for an id that is not in it."""
    place = np.searchsorted(sorted_ids, ids)
    found = place < len(sorted_ids)
    found[found] = sorted_ids[place[found]] == ids[found]
    return np.where(found, place, -1)
