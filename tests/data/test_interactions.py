"""Tests of the readers of logs and of their error messages."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from xsmoe.data import DataError, Interactions, read_interactions


def write_csv(folder: Path, *lines: str) -> Path:
    path = folder / "log.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(folder: Path, **columns: object) -> Path:
    path = folder / "log.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    return path


def rows(log: Interactions) -> list[tuple[str, str, int]]:
    return list(zip(log.users.tolist(), log.items.tolist(), log.timestamps.tolist(), strict=True))


def test_csv_is_sorted_by_time_and_equal_times_keep_their_order(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "user,item,timestamp", "b,y,7", "a,x,7", "c,z,3", "a,w,7")
    log = read_interactions(path)
    assert rows(log) == [("c", "z", 3), ("b", "y", 7), ("a", "x", 7), ("a", "w", 7)]
    assert log.timestamps.dtype == np.int64
    assert len(log) == 4


def test_many_equal_times_keep_their_order(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "user,item,timestamp", *(f"u,{i},{i % 2}" for i in range(200)))
    assert read_interactions(path).items.tolist() == [str(i) for part in (0, 1) for i in range(part, 200, 2)]


def test_other_columns_other_names_quotes_and_digits_as_ids(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "review,when,who,what", '"good, but\nlong",5,007,"a,b"', 'null,4,8,"say ""hi"""')
    log = read_interactions(path, user="who", item="what", timestamp="when")
    assert rows(log) == [("8", 'say "hi"', 4), ("007", "a,b", 5)]


def test_words_that_stand_for_null_elsewhere_are_ids(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "user,item,timestamp", "NA,null,1", "nan,NULL,2")
    assert rows(read_interactions(path)) == [("NA", "null", 1), ("nan", "NULL", 2)]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes("\ufeffuser,item,timestamp\r\nä,b,1\r\n".encode())
    assert rows(read_interactions(path)) == [("ä", "b", 1)]


def test_parquet_integers_become_strings(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, user=[3, 1], item=pa.array(["x", "x"]).dictionary_encode(), timestamp=[9, 2])
    assert rows(read_interactions(path)) == [("1", "x", 2), ("3", "x", 9)]


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint64(), pa.int64(), pa.large_string()])
def test_parquet_types_of_timestamps(tmp_path: Path, kind: pa.DataType) -> None:
    path = write_parquet(tmp_path, user=["a"], item=["x"], timestamp=pa.array([9]).cast(kind))
    assert rows(read_interactions(path)) == [("a", "x", 9)]


@pytest.mark.parametrize("value", ["2015-03-01T00:00:00", "1.5", "1e9", "-1", " 1", "", "99999999999999999999", "+5"])
def test_bad_timestamp_is_named_with_its_row(tmp_path: Path, value: str) -> None:
    path = write_csv(tmp_path, "user,item,timestamp", "a,x,1", f"a,x,{value}", "a,x,-7")
    with pytest.raises(DataError) as caught:
        read_interactions(path)
    message = str(caught.value)
    assert "data row 2" in message
    assert "'timestamp'" in message
    assert str(path) in message
    assert (repr(value) if value else "nothing") in message


def test_bad_timestamp_in_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, user=["a"] * 3, item=["x"] * 3, timestamp=[5, 2, -3])
    with pytest.raises(DataError, match=r"'-3' in data row 3"):
        read_interactions(path)


@pytest.mark.parametrize("values", [[1.0, 2.0], np.array(["2015-03-01", "2016-03-01"], "datetime64[s]"), [True, False]])
def test_other_types_of_timestamps_are_refused(tmp_path: Path, values: object) -> None:
    path = write_parquet(tmp_path, user=["a", "b"], item=["x", "x"], timestamp=values)
    with pytest.raises(DataError, match="timestamps must be whole seconds since 1970"):
        read_interactions(path)


def test_missing_column_lists_the_columns_and_the_argument(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "userId,item,timestamp", "a,x,1")
    with pytest.raises(DataError, match=r"no column 'user'.*userId, item, timestamp.*--user-column"):
        read_interactions(path)
    with pytest.raises(DataError, match=r"no column 'when'.*userId, item, timestamp.*--timestamp-column"):
        read_interactions(path, user="userId", timestamp="when")
    parquet = write_parquet(tmp_path, user=["a"], product=["x"], timestamp=[1])
    with pytest.raises(DataError, match=r"no column 'item'.*user, product, timestamp.*--item-column"):
        read_interactions(parquet)


def test_repeated_column_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "user,item,user,timestamp", "a,x,b,1")
    with pytest.raises(DataError, match="2 columns named 'user'"):
        read_interactions(path)


@pytest.mark.parametrize("line", [",x,2", 'b,"",2'])
def test_missing_ids_are_refused(tmp_path: Path, line: str) -> None:
    path = write_csv(tmp_path, "user,item,timestamp", "a,x,1", line)
    with pytest.raises(DataError, match=r"column '(user|item)' is empty in data row 2"):
        read_interactions(path)


def test_null_and_unfit_ids_in_parquet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'user' is empty in data row 2"):
        read_interactions(write_parquet(tmp_path, user=["a", None], item=["x", "x"], timestamp=[1, 2]))
    with pytest.raises(DataError, match=r"column 'item' is double; ids must be strings or integers"):
        read_interactions(write_parquet(tmp_path, user=["a", "b"], item=[1.0, 2.0], timestamp=[1, 2]))


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read_interactions(write_csv(tmp_path, "user,item,timestamp"))
    empty = pa.array([], pa.string())
    path = write_parquet(tmp_path, user=empty, item=empty, timestamp=pa.array([], pa.int64()))
    with pytest.raises(DataError, match="has no rows"):
        read_interactions(path)
    nothing = tmp_path / "nothing.csv"
    nothing.touch()
    with pytest.raises(DataError, match=r"nothing\.csv: cannot be read as csv"):
        read_interactions(nothing)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_interactions(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="cannot be read as csv"):
        read_interactions(write_csv(tmp_path, "user,item,timestamp", "a,x,1", "a,x"))
    text = tmp_path / "log.txt"
    text.write_text("user,item,timestamp\na,x,1\n")
    with pytest.raises(DataError, match=r"\.csv or \.parquet"):
        read_interactions(text)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_interactions(text.rename(tmp_path / "log.parquet"))


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    names = [f"user {number}" for number in range(2000)]
    path = write_parquet(tmp_path, user=names, item=names, timestamp=list(range(2000)))
    content = bytearray(path.read_bytes())
    content[4:100] = bytes(96)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_interactions(path)


def test_parquet_strings_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    bytes_only = pa.array([b"\xff"], pa.binary())
    path = write_parquet(tmp_path, user=bytes_only.view(pa.string()), item=["x"], timestamp=[1])
    with pytest.raises(DataError, match="cannot be read as parquet: .*UTF8"):
        read_interactions(path)


@pytest.mark.parametrize("kind", [np.uint64, np.uint8, np.int64])
def test_order_is_checked_whatever_the_integer(kind: type) -> None:
    names = np.array(["a", "b"], object)
    Interactions(names, names, np.array([1, 2], kind))
    with pytest.raises(ValueError, match="must ascend"):
        Interactions(names, names, np.array([2, 1], kind))


def test_timestamps_must_be_integers() -> None:
    names = np.array(["a", "b"], object)
    with pytest.raises(TypeError, match="timestamps must be integers, .* not float64"):
        Interactions(names, names, np.array([2, np.nan]))


def test_interactions_must_be_in_order_and_of_one_length() -> None:
    users, items = np.array(["a", "b"], object), np.array(["x", "y"], object)
    with pytest.raises(ValueError, match="must ascend"):
        Interactions(users, items, np.array([2, 1]))
    with pytest.raises(ValueError, match="one length, not 2, 2 and 1"):
        Interactions(users, items, np.array([2]))
