"""Tests of the order of interactions with equal timestamps."""

import os
import subprocess
import sys

import numpy as np
import pytest

from xsmoe.data.ties import tie_keys
from xsmoe.data.windows import make_windows, time_order


def names(prefix: str, numbers: np.ndarray) -> np.ndarray:
    return np.array([f"{prefix}{number}" for number in numbers], object)


def test_keys_are_the_same_everywhere() -> None:
    """Compare with recorded keys: another hash would change the windows of every run."""
    users, items = np.array(["ann", "bob", "ann"], object), np.array(["x", "x", "ü"], object)
    code = (
        "import numpy as np; from xsmoe.data.ties import tie_keys; "
        "print(*tie_keys(np.array(['bob', 'ann'], object), np.array(['x', 'x'], object), 7))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)
    keys = tie_keys(users, items, 7)
    assert keys.dtype == np.uint64
    assert keys.tolist() == KEYS
    assert done.stdout.split() == [str(KEYS[1]), str(KEYS[0])]


KEYS = [2223475257553685550, 5250329655262745841, 11429561241576524855]


def test_keys_depend_on_seed_user_and_item_alone() -> None:
    rng = np.random.default_rng(0)
    users, items = names("u", rng.integers(0, 50, 500)), names("i", rng.integers(0, 50, 500))
    keys = tie_keys(users, items, 3)
    order = rng.permutation(500)
    assert (tie_keys(users[order], items[order], 3) == keys[order]).all()
    pairs = set(zip(users, items, strict=True))
    assert len(np.unique(keys)) == len(pairs)
    assert not np.isin(tie_keys(users, items, 4), keys).any()
    assert not np.isin(tie_keys(items, users, 3), keys).any(), "a user is no item of the same name"
    assert tie_keys(users, items, 2**200).shape == (500,)


def test_keys_do_not_follow_the_names() -> None:
    users, items = names("u", np.repeat(np.arange(40), 50)), names("i", np.tile(np.arange(50), 40))
    order = np.argsort(tie_keys(users, items, 0))
    ranks = np.empty(2000)
    ranks[order] = np.arange(2000)
    # The standard error of the correlation of 2,000 samples is 0.022.
    for numbers in (np.repeat(np.arange(40), 50), np.tile(np.arange(50), 40)):
        assert abs(np.corrcoef(ranks, numbers)[0, 1]) < 0.1
    # The order of items differs between users.
    mine = ranks.reshape(40, 50).argsort(axis=1).argsort(axis=1)
    assert abs(np.corrcoef(mine)[np.triu_indices(40, 1)].mean()) < 0.05


@pytest.mark.parametrize("string_sort", [False, True])
def test_ties_are_broken_by_the_values_given(string_sort: bool) -> None:
    times, ties = np.array([20, 3, 20, 3, 20]), np.array([5, 1, 2, 0, 9], np.uint64)
    expected = [2, 0, 4, 3, 1] if string_sort else [3, 1, 2, 0, 4]
    assert time_order(times, string_sort=string_sort, ties=ties).tolist() == expected
    windows = make_windows(np.arange(5), np.arange(5), times, 2, string_sort=string_sort, ties=ties)
    assert [user for window in windows for user in window.users.tolist()] == expected
