"""Item sequences for training, validation and testing, built from a window's interactions."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from xsmoe.data.ragged import gather
from xsmoe.data.windows import Window

Pairs = tuple[np.ndarray, np.ndarray]

_USER_BITS = 31
_ITEM_BITS = 32
_ITEM_MASK = (1 << _ITEM_BITS) - 1


@dataclass(frozen=True)
class Sequences:
    """B concatenated sequences of items. Each sequence belongs to one user.

    Attributes:
        users: (B,) int64; a user may have several sequences.
        items: (M,) int64, each sequence's items in time order.
        offsets: (B+1,) int64; sequence b holds `items[offsets[b]:offsets[b + 1]]`.
    """

    users: np.ndarray
    items: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64: how many items each sequence has."""
        return np.diff(self.offsets)

    def take(self, indices: np.ndarray) -> "Sequences":
        """Return the sequences with these indices, (K,) integers, in this order. An index may occur twice."""
        values, offsets = gather(self.items, self.offsets[:-1][indices], self.lengths[indices])
        return Sequences(self.users[indices], values, offsets)


@dataclass(frozen=True)
class WindowSplits:
    """A window, split for training and validation. The whole window tests the model of the previous window.

    Attributes:
        train: sequences of the training split: all sequences of a user, or the last one.
        validation, test: sequences of the last items of each user in that split.
        train_pairs, validation_pairs, all_pairs: (users, items), each (N,) int64: all interactions of each split in
            time order, after the k-core filter and before sequences are cut.
        all_times: (N,) int64, the times of the interactions of `all_pairs`, in seconds.
    """

    train: Sequences
    validation: Sequences
    test: Sequences
    train_pairs: Pairs
    validation_pairs: Pairs
    all_pairs: Pairs
    all_times: np.ndarray

    @property
    def in_train_sequences(self) -> int:
        """Return the number of interactions of the training split that are in a sequence.

        An interaction in two sequences counts once.
        """
        return len(self.train.items) - (len(self.train) - len(np.unique(self.train.users)))


def split_window(
    window: Window,
    *,
    k_core: int = 5,
    train_fraction: float = 0.85,
    max_items: int = 11,
    history: Literal["all", "last"] = "last",
) -> WindowSplits:
    """Split a window by the protocol of arXiv 2508.05993.

    Only users with at least `k_core` interactions in the window are kept. Items are not filtered, and users are not
    filtered again. The first part of the kept interactions, by count in time order, is the training split. The rest is
    the validation split. The test sequences come from both. In each split, a user's sequence is the last `max_items`
    items. Users with fewer than 2 items have no sequence. Sequences are sorted by user. With history "all", which is
    not the published protocol, all items of a user's training split are in sequences.

    Args:
        window: the window, in time order.
        k_core: the smallest number of interactions that keeps a user; 1 keeps all users.
        train_fraction: share of the kept interactions in the training split, rounded down; above 0, below 1.
        max_items: longest sequence, target included; at least 2.
        history: for the training split. "last" builds one sequence for each user. "all" cuts all of a user's items into
            sequences of `max_items` that overlap by one item, from the last item backwards. Then every item except the
            user's first is the target of one input. The earliest sequence may be shorter. A user's sequences are in
            time order.

    Raises:
        ValueError: an argument is out of its range.
    """
    if k_core < 1:
        raise ValueError(f"k_core must be at least 1 (1 keeps every user), not {k_core}")
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction must lie between 0 and 1, both excluded, not {train_fraction}")
    if max_items < 2:
        raise ValueError(f"max_items must be at least 2 (one input and the target), not {max_items}")
    if history not in ("all", "last"):
        raise ValueError(f"history must be 'all' or 'last', not {history!r}")
    _, inverse, counts = np.unique(window.users, return_inverse=True, return_counts=True)
    keep = counts[inverse] >= k_core
    users, items = window.users[keep], window.items[keep]
    cut = int(len(users) * train_fraction)
    train, validation = (users[:cut], items[:cut]), (users[cut:], items[cut:])
    return WindowSplits(
        train=_sequences(*train, max_items, every=history == "all"),
        validation=_sequences(*validation, max_items),
        test=_sequences(users, items, max_items),
        train_pairs=train,
        validation_pairs=validation,
        all_pairs=(users, items),
        all_times=window.timestamps[keep],
    )


def whole_sequences(pairs: Pairs) -> Sequences:
    """Return the sequence of all items of every user with at least 2 items.

    Args:
        pairs: (users, items), each (N,) int64, in time order.
    """
    users, items = pairs
    return _sequences(users, items, max(2, len(users)))


def item_share(sequences: Sequences, num_items: int) -> np.ndarray:
    """Return each item's share of all items in the sequences, (num_items,) float64: the p(i) of the logQ correction.

    Items are counted after sequences are cut and short ones removed, because batches are drawn from these sequences. If
    there is no sequence, all shares are 0.

    Raises:
        ValueError: an item id is outside [0, num_items).
    """
    items = sequences.items
    if len(items) and not 0 <= items.min() <= items.max() < num_items:
        raise ValueError(f"sequences hold items from {items.min()} to {items.max()}, but num_items is {num_items}")
    return np.bincount(items, minlength=num_items) / max(len(items), 1)


class History:
    """The distinct items of each user. Pairs can be added.

    A pair is stored as one integer, with the user in the upper bits and the item in the lower bits, in one sorted
    array. `add` sorts; `of` uses binary search.
    """

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)

    def __len__(self) -> int:
        """Return the number of distinct pairs of user and item."""
        return len(self._keys)

    def add(self, users: np.ndarray, items: np.ndarray) -> None:
        """Add pairs, each (N,) int64, in any order. Known pairs have no effect.

        Raises:
            TypeError: the ids are not integers.
            ValueError: the lengths differ, an id is negative, a user id is 2^31 or more, or an item id is 2^32 or more.
        """
        if users.shape != items.shape:
            raise ValueError(f"users and items must have one shape, not {users.shape} and {items.shape}")
        added = _checked("users", users, 1 << _USER_BITS) << _ITEM_BITS | _checked("items", items, 1 << _ITEM_BITS)
        # np.unique uses hashing, which is several times slower than sorting an array that is mostly sorted.
        keys = np.sort(np.concatenate([self._keys, added]), kind="stable")
        distinct = np.ones(len(keys), bool)
        distinct[1:] = keys[1:] != keys[:-1]
        self._keys = keys[distinct]

    def of(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the items of these users, (B,) int64. An unknown user has none.

        Returns:
            The items, (M,) int64, ascending within each user, and the offsets, (B+1,) int64. The items of `users[b]`
            are `values[offsets[b]:offsets[b + 1]]`.

        Raises:
            TypeError: the ids are not integers.
            ValueError: an id is negative, or 2^31 or more.
        """
        least = _checked("users", users, 1 << _USER_BITS) << _ITEM_BITS
        first = np.searchsorted(self._keys, least)
        last = np.searchsorted(self._keys, least | _ITEM_MASK, side="right")
        keys, offsets = gather(self._keys, first, last - first)
        return keys & _ITEM_MASK, offsets

    def pairs(self) -> Pairs:
        """Return all pairs as (users, items), each int64, users ascending, items ascending within a user."""
        return self._keys >> _ITEM_BITS, self._keys & _ITEM_MASK


def _checked(name: str, ids: np.ndarray, limit: int) -> np.ndarray:
    """Return ids as (N,) int64 after a check that each is in [0, limit)."""
    if ids.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), not {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {ids.dtype}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < limit:
        raise ValueError(f"{name} must lie in [0, {limit}), but holds ids from {ids.min()} to {ids.max()}")
    return ids.astype(np.int64, copy=False)


def _sequences(users: np.ndarray, items: np.ndarray, max_items: int, *, every: bool = False) -> Sequences:
    """Return the last sequence of each user with at least 2 items or, with `every`, all sequences; B in total."""
    order = np.argsort(users, kind="stable")
    distinct, counts = np.unique(users, return_counts=True)
    enough = counts >= 2
    distinct, counts, ends = distinct[enough], counts[enough], np.cumsum(counts)[enough]
    inputs = max_items - 1
    # Enough sequences that each item except the first is a target once.
    numbers = -(-(counts - 1) // inputs) if every else np.ones_like(counts)
    owner = np.repeat(np.arange(len(counts)), numbers)
    later = np.cumsum(numbers)[owner] - 1 - np.arange(len(owner))
    lengths = np.minimum(counts[owner] - later * inputs, max_items)
    values, offsets = gather(items[order], ends[owner] - later * inputs - lengths, lengths)
    return Sequences(distinct[owner], values, offsets)
