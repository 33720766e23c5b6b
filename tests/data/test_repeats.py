"""Tests of duplicates within a log, and of interactions that an earlier log contains."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsmoe.data import Dataset, Interactions, Items, LogSummary, read_interactions, summarize_log, write_dataset
from xsmoe.data.repeats import exact_duplicates, factorize, seen_before

Row = tuple[str, str, int]
rows = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 4)), min_size=1, max_size=25)


def log(given_rows: list[Row]) -> Interactions:
    users, items, times = zip(*given_rows, strict=True)
    return Interactions.in_time_order(np.array(users, object), np.array(items, object), np.array(times, np.int64))


@given(rows)
def test_counts_against_loops(given_rows: list[Row]) -> None:
    distinct = list(dict.fromkeys(given_rows))
    times = Counter((user, time) for user, _, time in distinct)
    assert summarize_log(log(given_rows)) == LogSummary(
        rows=len(given_rows),
        users=len({user for user, _, _ in given_rows}),
        items=len({item for _, item, _ in given_rows}),
        duplicates=len(given_rows) - len(distinct),
        repeats=len(distinct) - len({(user, item) for user, item, _ in distinct}),
        shared_time=sum(times[user, time] > 1 for user, _, time in distinct) / len(distinct),
        first=min(time for _, _, time in given_rows),
        last=max(time for _, _, time in given_rows),
    )


@given(rows)
def test_the_first_of_equal_rows_is_no_duplicate(given_rows: list[Row]) -> None:
    found = log(given_rows)
    duplicates = exact_duplicates(factorize(found.users)[1], factorize(found.items)[1], found.timestamps)
    met: set[Row] = set()
    for duplicate, *row in zip(duplicates, found.users, found.items, found.timestamps.tolist(), strict=True):
        assert duplicate == (tuple(row) in met)
        met.add(tuple(row))


def test_a_log_with_every_row_twice() -> None:
    counts = summarize_log(log([("a", "x", 1), ("a", "y", 1), ("b", "x", 2), ("a", "x", 9)] * 2))
    assert (counts.rows, counts.duplicates, counts.repeats, counts.shared_time) == (8, 4, 1, 0.5)


@given(rows, rows)
def test_repeats_of_an_earlier_log_against_a_set(new: list[Row], old: list[Row]) -> None:
    # Odd times are not multiples of a thousand or of a day.
    new, old = ([(user, item, 2 * time + 1) for user, item, time in part] for part in (new, old))
    ordered = log(new)
    expected = [row in set(old) for row in sorted(new, key=lambda row: row[2])]
    assert seen_before(ordered, log(old)).tolist() == expected


@pytest.mark.parametrize("factor", [10**3, 10**6, 10**9])
def test_counters_are_found_in_other_units(factor: int) -> None:
    fine = [("a", "x", 3 * factor), ("a", "y", 5 * factor), ("b", "x", 7 * factor)]
    coarse = [("a", "x", 3), ("a", "y", 6), ("c", "x", 7)]
    assert seen_before(log(coarse), log(fine)).tolist() == [True, False, False]
    assert seen_before(log(fine), log(coarse)).tolist() == [True, False, False]


@pytest.mark.parametrize("dates_first", [True, False])
def test_days_are_found_among_seconds(dates_first: bool) -> None:
    noon = 1_600_000_000
    days = log([("a", "x", noon // 86_400 * 86_400), ("a", "y", 86_400 * 18_520)])
    seconds = log([("a", "x", noon), ("b", "y", noon + 5)])
    first, second = (days, seconds) if dates_first else (seconds, days)
    assert seen_before(second, first).sum() == 1


@pytest.mark.parametrize("factor", [1, 10**3, 10**6, 10**9])
def test_files_in_any_unit_are_found(tmp_path: Path, factor: int) -> None:
    times = [1_600_000_000 + 61 * number for number in range(20)]
    path = tmp_path / "log.csv"
    path.write_text("user,item,timestamp\n" + "".join(f"u,i{time},{time * factor + factor // 2}\n" for time in times))
    before = log([("u", f"i{time}", time) for time in times[:15]])
    assert seen_before(read_interactions(path), before).tolist() == [True] * 15 + [False] * 5


def test_rows_are_kept_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,timestamp\nb,x,9\na,x,5\nb,x,9\na,y,5\n")
    found = read_interactions(path)
    items = Items(np.array(["x", "y"], object), np.array(["lamp", None], object), np.array([None, None], object))
    written = write_dataset(tmp_path / "dataset", found, items)
    for interactions in (found, written.interactions, Dataset.load(tmp_path / "dataset").interactions):
        assert interactions.rows.tolist() == [2, 4, 1, 3]
        assert interactions.items.tolist() == ["x", "y", "x", "x"]
    assert written.interactions.notes == found.notes != ()
