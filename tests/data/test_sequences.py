"""Tests of splits, sequences and histories against simple loops over users."""

from collections import Counter
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsmoe.data import History, Sequences, Window, item_share, make_windows, split_window

Pair = tuple[int, int]

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=90)


def arrays(rows: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def window(rows: list[Pair]) -> Window:
    users, items = arrays(rows)
    return Window(0, users, items, np.zeros(len(rows), np.int64))


def as_dict(sequences: Sequences) -> dict[int, list[int]]:
    found = {
        int(user): sequences.items[sequences.offsets[row] : sequences.offsets[row + 1]].tolist()
        for row, user in enumerate(sequences.users)
    }
    assert list(found) == sorted(found)
    assert len(found) == len(sequences)
    assert sequences.lengths.tolist() == [len(items) for items in found.values()]
    assert sequences.offsets[0] == 0
    assert sequences.offsets[-1] == len(sequences.items)
    assert {array.dtype for array in vars(sequences).values()} == {np.dtype(np.int64)}
    return found


def naive_sequences(rows: list[Pair], max_items: int) -> dict[int, list[int]]:
    taken: dict[int, list[int]] = {}
    for user, item in rows:
        taken.setdefault(user, []).append(item)
    return {user: items[-max_items:] for user, items in taken.items() if len(items) >= 2}


@given(pairs, st.integers(1, 8), st.sampled_from([0.01, 0.5, 0.85, 0.99]), st.integers(2, 12))
def test_split_against_a_loop(rows: list[Pair], k_core: int, train_fraction: float, max_items: int) -> None:
    split = split_window(window(rows), k_core=k_core, train_fraction=train_fraction, max_items=max_items)
    counts = Counter(user for user, _ in rows)
    kept = [(user, item) for user, item in rows if counts[user] >= k_core]
    cut = int(train_fraction * len(kept))
    for part, found, sequences in (
        (kept[:cut], split.train_pairs, split.train),
        (kept[cut:], split.validation_pairs, split.validation),
        (kept, split.all_pairs, split.test),
    ):
        assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == part
        assert as_dict(sequences) == naive_sequences(part, max_items)


@given(pairs, st.integers(2, 12))
def test_all_of_the_history_against_a_loop(rows: list[Pair], max_items: int) -> None:
    split = split_window(window(rows), k_core=1, max_items=max_items, history="all")
    last = split_window(window(rows), k_core=1, max_items=max_items)
    expected = []
    for user, items in sorted(naive_sequences(list(zip(*map(list, split.train_pairs), strict=True)), 1 << 30).items()):
        stop, found = len(items), []
        while stop > 1:
            found.insert(0, (user, items[max(0, stop - max_items) : stop]))
            stop -= max_items - 1
        expected += found
    train = split.train
    places = zip(train.users.tolist(), train.offsets[:-1], train.offsets[1:], strict=True)
    assert [(user, train.items[start:stop].tolist()) for user, start, stop in places] == expected
    # Each interaction except a user's first is a target once. A user's last sequence is the published one.
    assert sum(train.lengths - 1) == sum(
        len(items) - 1
        for items in naive_sequences(list(zip(*map(list, split.train_pairs), strict=True)), 1 << 30).values()
    )
    ends = np.flatnonzero(np.append(train.users[1:] != train.users[:-1], True)) if len(train) else np.empty(0, int)
    assert as_dict(train.take(ends)) == as_dict(last.train)
    assert as_dict(split.test) == as_dict(last.test)
    assert as_dict(split.validation) == as_dict(last.validation)


@pytest.mark.parametrize("history", ["all", "last"])
def test_interactions_in_train_sequences_are_counted_once(history: Literal["all", "last"]) -> None:
    rows = [(user, item) for item in range(12) for user in range(3) if item < (12, 4, 1)[user]]
    split = split_window(window(rows), k_core=1, train_fraction=0.999, max_items=4, history=history)
    # All interactions except user 0's last, which is the validation split, and user 2's only one.
    assert split.in_train_sequences == (11 + 4 if history == "all" else 4 + 4)


def test_an_unknown_history_is_named() -> None:
    with pytest.raises(ValueError, match="history must be 'all' or 'last', not 'some'"):
        split_window(window([(0, 1)]), history="some")  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2)), min_size=2, max_size=60))
def test_ties_in_time_keep_the_order_of_the_log(rows: list[tuple[int, int, int]]) -> None:
    users, items, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    first, second = (split_window(part, k_core=1) for part in make_windows(users, items, times, 2))
    ordered = [(user, item) for user, item, _ in sorted(rows, key=lambda row: row[2])]
    half = (len(rows) + 1) // 2
    assert as_dict(first.test) == naive_sequences(ordered[:half], 11)
    assert as_dict(second.test) == naive_sequences(ordered[half:], 11)


def test_long_sequences_stay_in_order() -> None:
    """The sequences are long enough to detect an unstable sort."""
    rows = [(item % 3, item) for item in range(3000)]
    assert as_dict(split_window(window(rows), max_items=3000).test) == naive_sequences(rows, 3000)


def test_published_sizes() -> None:
    """Users have 14, 5 and 4 items. The k-core filter keeps 19 of them, and 85 % of 19, rounded down, are 16."""
    rows = [(2, item) for item in range(4)] + [(1, item) for item in range(14)] + [(0, item) for item in range(5)]
    split = split_window(window(rows))
    assert as_dict(split.test) == {0: [0, 1, 2, 3, 4], 1: list(range(3, 14))}
    assert as_dict(split.train) == {0: [0, 1], 1: list(range(3, 14))}
    assert as_dict(split.validation) == {0: [2, 3, 4]}


def test_the_fraction_of_a_round_number_is_exact() -> None:
    for size in range(20, 2001, 20):
        split = split_window(window([(0, 0)] * size), k_core=1)
        assert len(split.train_pairs[0]) == size * 17 // 20


def test_nothing_left() -> None:
    for rows in ([], [(0, 1), (1, 1), (0, 2)]):
        split = split_window(window(rows))
        for sequences in (split.train, split.validation, split.test):
            assert as_dict(sequences) == {}
            assert len(sequences.take(np.empty(0, np.int64))) == 0
        assert item_share(split.train, 3).tolist() == [0, 0, 0]


def test_an_empty_validation_split() -> None:
    split = split_window(window([(0, 1), (0, 2), (1, 3)]), k_core=1, train_fraction=0.7)
    assert as_dict(split.train) == {0: [1, 2]}
    assert as_dict(split.validation) == {}
    assert split.validation_pairs[1].tolist() == [3]


@pytest.mark.parametrize("setting", [{"k_core": 0}, {"train_fraction": 1.0}, {"train_fraction": 0.0}, {"max_items": 1}])
def test_settings_out_of_range(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        split_window(window([(0, 1)]), **setting)  # type: ignore[arg-type]


@given(pairs, st.lists(st.integers(0, 6), max_size=12))
def test_take(rows: list[Pair], wanted: list[int]) -> None:
    sequences = split_window(window(rows), k_core=1).test
    indices = np.array([place for place in wanted if place < len(sequences)], dtype=np.int64)
    taken = sequences.take(indices)
    whole = list(as_dict(sequences).items())
    assert taken.users.tolist() == [whole[place][0] for place in indices]
    assert taken.items.tolist() == [item for place in indices for item in whole[place][1]]
    assert taken.lengths.tolist() == [len(whole[place][1]) for place in indices]


def test_item_share_counts_after_the_cut() -> None:
    rows = [(0, 0), (0, 1), (0, 1), (0, 2), (1, 3)]
    split = split_window(window(rows), k_core=1, max_items=3)
    assert item_share(split.test, 5).tolist() == [0, 2 / 3, 1 / 3, 0, 0]
    with pytest.raises(ValueError, match="items from 1 to 2, but num_items is 2"):
        item_share(split.test, 2)


@given(st.lists(pairs, max_size=4), st.lists(st.integers(0, 8), max_size=10))
def test_history_against_sets(parts: list[list[Pair]], asked: list[int]) -> None:
    history, known = History(), set[Pair]()
    for part in parts:
        history.add(*arrays(part))
        known |= set(part)
    assert len(history) == len(known)
    values, offsets = history.of(np.array(asked, dtype=np.int64))
    assert values.dtype == offsets.dtype == np.int64
    assert offsets.shape == (len(asked) + 1,)
    for row, user in enumerate(asked):
        expected = sorted(item for owner, item in known if owner == user)
        assert values[offsets[row] : offsets[row + 1]].tolist() == expected
    assert list(zip(*(array.tolist() for array in history.pairs()), strict=True)) == sorted(known)
    rebuilt = History()
    rebuilt.add(*history.pairs())
    assert [array.tolist() for array in rebuilt.pairs()] == [array.tolist() for array in history.pairs()]


def test_history_at_the_ends_of_its_range() -> None:
    history = History()
    users, items = np.array([2**31 - 1, 2**31 - 1, 0, 1]), np.array([2**32 - 1, 0, 2**32 - 1, 0])
    history.add(users, items)
    values, offsets = history.of(np.array([2**31 - 1, 0, 1, 2]))
    assert values.tolist() == [0, 2**32 - 1, 2**32 - 1, 0]
    assert offsets.tolist() == [0, 2, 3, 4, 4]


@pytest.mark.parametrize("user, item", [(-1, 0), (0, -1), (2**31, 0), (0, 2**32)])
def test_history_refuses_ids_that_it_cannot_hold(user: int, item: int) -> None:
    history = History()
    with pytest.raises(ValueError, match="must lie in"):
        history.add(np.array([0, user]), np.array([0, item]))
    with pytest.raises(ValueError, match="one shape"):
        history.add(np.array([0, 1]), np.array([0]))
    assert len(history) == 0


@pytest.mark.parametrize("user", [-1, 2**31, 2**32, 2**32 + 1])
def test_history_refuses_to_look_up_users_that_it_cannot_hold(user: int) -> None:
    history = History()
    history.add(np.array([0, 1]), np.array([5, 6]))
    with pytest.raises(ValueError, match=rf"users must lie in \[0, 2147483648\), but holds .*{user}"):
        history.of(np.array([0, user] if user > 0 else [user, 0]))


def test_history_accepts_integers_of_any_type_only() -> None:
    history = History()
    history.add(np.array([3, 2], np.uint64), np.array([200, 7], np.uint64))
    history.add(np.array([3], np.uint8), np.array([201], np.uint8))
    assert history.of(np.array([3], np.uint8))[0].tolist() == [200, 201]
    with pytest.raises(TypeError, match="users must be integers, not float64"):
        history.add(np.array([1.5]), np.array([1]))
    with pytest.raises(TypeError, match="users must be integers, not float64"):
        history.of(np.array([3.5]))
    with pytest.raises(ValueError, match=r"users must have shape \(N,\), not \(1, 2\)"):
        history.of(np.array([[2, 3]]))
    assert len(history) == 3
