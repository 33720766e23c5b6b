"""Tests of the units of timestamps: certain units are converted, uncertain ones are refused."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsmoe.data import DataError, read_interactions
from xsmoe.data.times import DAY, to_seconds

FACTORS = {"milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
SECONDS = [1_600_000_000, 1_500_000_000, 1_650_000_123]


def convert(values: list[int]) -> tuple[list[int], str | None]:
    seconds, note = to_seconds(Path("log.csv"), "time", np.array(values, np.int64))
    assert seconds.dtype == np.int64
    return seconds.tolist(), note


@pytest.mark.parametrize("unit", FACTORS)
def test_finer_units_become_seconds_with_a_note(unit: str) -> None:
    seconds, note = convert([value * FACTORS[unit] + 7 for value in SECONDS])
    assert seconds == SECONDS
    assert note == f"log.csv: column 'time' holds {unit}; converted to seconds, from 2017-07-14 to 2022-04-15"


def test_dates_become_midnights() -> None:
    seconds, note = convert([20230105, 19991231, 20240229])
    assert seconds == [
        int(datetime(*day, tzinfo=UTC).timestamp()) for day in ((2023, 1, 5), (1999, 12, 31), (2024, 2, 29))
    ]
    assert note is not None
    assert "dates written as yyyymmdd; converted to seconds, from 1999-12-31 to 2024-02-29" in note


@given(st.lists(st.dates(datetime(1990, 1, 1).date(), datetime(2099, 12, 31).date()), min_size=1, max_size=8))
def test_every_date_is_found(days: list) -> None:
    seconds, _ = convert([int(day.strftime("%Y%m%d")) for day in days])
    assert seconds == [(day - datetime(1970, 1, 1).date()).days * DAY for day in days]


def test_seconds_do_not_change_and_have_no_note() -> None:
    assert convert(SECONDS) == (SECONDS, None)
    old = [94_694_400, 500_000_000, *SECONDS]  # from 1973 on
    assert convert(old) == (old, None)


@pytest.mark.parametrize("values", [[0], [0, 1, 2, 2], [5, 1_000_000], [20230105, 1], [19_737, 19_738], [600_000_000]])
def test_counters_and_times_before_1990_are_kept_with_a_note(values: list[int]) -> None:
    seconds, note = convert(values)
    assert seconds == values
    assert note is not None
    assert f"from {min(values)} to {max(values)}, before 1990" in note


def test_seconds_most_of_which_lie_before_1990_are_kept_with_a_note() -> None:
    old = [500_000_000, 550_000_000, 600_000_000, 700_000_000]
    seconds, note = convert(old)
    assert seconds == old
    assert note is not None
    assert "from 1985-11-05 to 1992-03-07, most of them before 1990; kept as it is" in note


OUTLIERS = [
    (base, factor)
    for base in (1, 10**3, 10**6, 10**9)
    for factor in (10**-9, 10**-6, 10**-3, 10, 10**3, 10**6, 10**9)
    if base * factor <= 10**9
]


@pytest.mark.parametrize("base, factor", OUTLIERS)
def test_an_outlier_is_refused_with_its_row(base: int, factor: float) -> None:
    values = [value * base for value in SECONDS * 4]
    values[7] = round(values[7] * factor)
    with pytest.raises(
        DataError, match=rf"mixes units: 11 of its 12 values .* data row 8 holds {values[7]}; timestamps"
    ):
        convert(values)


def test_mixed_units_are_refused_with_the_first_rows() -> None:
    values = [*SECONDS, *SECONDS, *(value * 1000 for value in (*SECONDS, *SECONDS[:2]))]
    with pytest.raises(DataError) as caught:
        convert(values)
    message = str(caught.value)
    assert "6 of its 11 values are seconds" in message
    assert "data row 7 holds 1600000000000, data row 8 holds 1500000000000, data row 9 holds 1650000123000" in message
    assert "2 more rows differ" in message


@pytest.mark.parametrize("wrong", [20230230, 20231301, 20230100, 99999999, 0, 1_600_000_000])
def test_dates_with_something_else_among_them_are_refused(wrong: int) -> None:
    with pytest.raises(DataError, match=rf"data row 3 holds {wrong}"):
        convert([20230105, 20230106, wrong, 20230107])


@pytest.mark.parametrize(
    "value",
    [
        20230105123000,  # yyyymmddhhmmss
        133_000_000_000_000_000,  # units of 100 ns since 1601
        13_300_000_000_000_000,  # microseconds since 1601
        638_000_000_000_000_000,  # units of 100 ns since the year 1
        5_000_000_000,  # the year 2128
        2_023_010_512,  # yyyymmddhh
        300_000_000_000,  # milliseconds of 1979
    ],
)
def test_ambiguous_numbers_are_refused(value: int) -> None:
    with pytest.raises(DataError, match=r"in no unit|or units of 100 ns|or dates written as yyyymmddhh"):
        convert([value, value + 1])


def test_the_reader_converts_keeps_the_finer_order_and_names_rows(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,timestamp\na,x,1600000000900\na,y,1600000000100\nb,x,1500000000000\n")
    log = read_interactions(path)
    assert log.timestamps.tolist() == [1_500_000_000, 1_600_000_000, 1_600_000_000]
    assert log.items.tolist() == ["x", "y", "x"]
    assert log.rows.tolist() == [3, 2, 1]
    assert log.notes == (
        f"{path}: column 'timestamp' holds milliseconds; converted to seconds, from 2017-07-14 to 2020-09-13",
    )


@pytest.mark.parametrize("value", ["1600000000000000000", "0001600000000"])
def test_nineteen_digits_and_leading_zeros_are_numbers(tmp_path: Path, value: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,timestamp\na,x,{value}\n")
    assert read_interactions(path).timestamps.tolist() == [1_600_000_000]


@pytest.mark.parametrize("value", ["9223372036854775808", "00000000000000000001"])
def test_numbers_beyond_int64_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,timestamp\na,x,1\na,x,{value}\n")
    with pytest.raises(DataError, match=rf"'{value}' in data row 2"):
        read_interactions(path)
