"""Tests of cutting a log into windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsmoe.data import Window, make_windows


def log(times: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a log whose user ids number the interactions, so that they identify a window's content."""
    return np.arange(len(times)), np.arange(len(times)) + 1000, np.array(times, dtype=np.int64)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.integers(2, 8))
def test_windows_are_equal_stretches_in_stable_time_order(times: list[int], num_windows: int) -> None:
    num_windows = min(num_windows, len(times))
    windows = make_windows(*log(times), num_windows)
    order = sorted(range(len(times)), key=lambda row: times[row])
    assert [user for window in windows for user in window.users.tolist()] == order
    assert [item for window in windows for item in window.items.tolist()] == [row + 1000 for row in order]
    assert [time for window in windows for time in window.timestamps.tolist()] == sorted(times)
    sizes = [len(window) for window in windows]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert [window.number for window in windows] == list(range(num_windows))


def test_string_sort_is_that_of_digits() -> None:
    windows = make_windows(*log([9, 10, 100, 11]), 2, string_sort=True)
    assert [window.timestamps.tolist() for window in windows] == [[10, 100], [11, 9]]


def test_string_sort_leaves_equal_times_as_numpys_default_sort_does() -> None:
    times = np.tile([5, 6], 400)
    windows = make_windows(*log(times.tolist()), 2, string_sort=True)
    order = np.argsort(times.astype(str), kind="quicksort")
    assert [user for window in windows for user in window.users.tolist()] == order.tolist()


def test_impossible_cuts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_windows must be at least 2 .*, not 1"):
        make_windows(*log([1, 2]), 1)
    with pytest.raises(ValueError, match="num_windows is 3, but there are only 2 interactions"):
        make_windows(*log([1, 2]), 3)
    with pytest.raises(ValueError, match="only 0 interactions"):
        make_windows(*log([]), 2)


def test_arrays_that_do_not_fit_are_refused() -> None:
    users, items, times = log([1, 2, 3])
    with pytest.raises(TypeError, match="timestamps must be int64, not float64"):
        make_windows(users, items, times / 2, 2)
    with pytest.raises(ValueError, match=r"items must have shape \(3,\) as users has, not \(2,\)"):
        make_windows(users, items[:2], times, 2)
    with pytest.raises(ValueError, match=r"users must have shape \(3,\)"):
        Window(0, users[:, None], items, times)
