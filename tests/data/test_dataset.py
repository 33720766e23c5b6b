"""Tests of the dataset folder: a round trip, and errors for inconsistent data."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from xsmoe.data import DataError, Dataset, Interactions, Items, write_dataset


def strings(*values: str | None) -> np.ndarray:
    return np.array(values, dtype=object)


def interactions() -> Interactions:
    return Interactions(strings("a", "b", "a"), strings("x", "x", "y"), np.array([1, 2, 2]))


def items() -> Items:
    return Items(strings("x", "y", "z"), strings("a lamp", None, None), strings(None, "images/y.png", None))


def table(folder: Path, **changes: object) -> None:
    """Replace items.parquet. Leave out a column that is None."""
    columns = {"item": ["x", "y"], "text": ["a", "b"], "image": pa.nulls(2, pa.string())} | changes
    pa.parquet.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), folder / "items.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path, interactions(), items())
    return tmp_path


def test_round_trip(tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "new" / "folder", interactions(), items())
    loaded = Dataset.load(tmp_path / "new" / "folder")
    for dataset in (written, loaded):
        assert dataset.folder == tmp_path / "new" / "folder"
        assert dataset.interactions.users.tolist() == ["a", "b", "a"]
        assert dataset.interactions.items.tolist() == ["x", "x", "y"]
        assert dataset.interactions.timestamps.tolist() == [1, 2, 2]
        assert dataset.items.ids.tolist() == ["x", "y", "z"]
        assert dataset.items.texts.tolist() == ["a lamp", None, None]
        assert dataset.items.images.tolist() == [None, "images/y.png", None]
    assert len(loaded.items) == 3
    assert {path.name for path in loaded.folder.iterdir()} == {"interactions.parquet", "items.parquet"}


def test_schema_on_disk(folder: Path) -> None:
    schema = pa.parquet.read_schema(folder / "interactions.parquet")
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "user": pa.string(),
        "item": pa.string(),
        "timestamp": pa.int64(),
        "row": pa.int64(),
    }
    schema = pa.parquet.read_schema(folder / "items.parquet")
    assert dict(zip(schema.names, schema.types, strict=True)) == dict.fromkeys(("item", "text", "image"), pa.string())


def test_tables_from_elsewhere(folder: Path) -> None:
    pa.parquet.write_table(pa.table({"user": [1], "item": [20], "timestamp": [5]}), folder / "interactions.parquet")
    table(folder, item=[10, 20], text=["", "b"], image=pa.nulls(2), price=[1.0, 2.0])
    loaded = Dataset.load(folder)
    assert loaded.items.ids.tolist() == ["10", "20"]
    assert loaded.items.texts.tolist() == [None, "b"]
    assert loaded.items.images.tolist() == [None, None]


def test_a_failed_write_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_table = pa.parquet.write_table

    def fail_on_second(content: pa.Table, where: Path) -> None:
        if "interactions" in where.name:
            raise OSError("disk full")
        write_table(content, where)

    monkeypatch.setattr(pa.parquet, "write_table", fail_on_second)
    with pytest.raises(OSError, match="disk full"):
        write_dataset(folder, interactions(), Items(*(array[:2] for array in vars(items()).values())))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("column", ["item", "text", "image"])
def test_missing_column(folder: Path, column: str) -> None:
    table(folder, **{column: None})
    with pytest.raises(DataError, match=rf"items\.parquet: has no column '{column}'"):
        Dataset.load(folder)


def test_duplicate_items(folder: Path) -> None:
    table(folder, item=["x", "x"])
    with pytest.raises(DataError, match=r"distinct, but 'x' occur more than once"):
        Dataset.load(folder)
    with pytest.raises(DataError, match="distinct"):
        write_dataset(folder, interactions(), Items(strings("x", "x"), strings(None, None), strings(None, None)))


def test_unlisted_items(folder: Path) -> None:
    table(folder, item=["x", "w"])
    with pytest.raises(DataError, match=r"1 items are not in items\.parquet: 'y'"):
        Dataset.load(folder)
    log = Interactions(strings(*"u" * 9), strings(*"xdcbaefgh"), np.arange(9))
    with pytest.raises(DataError, match=r"8 items .*'a', 'b', 'c', 'd', 'e' and 3 more"):
        write_dataset(folder, log, items())


def test_absolute_image_path(folder: Path) -> None:
    table(folder, image=["/home/someone/x.png", None])
    with pytest.raises(DataError, match=r"relative to the folder, but '/home/someone/x\.png'"):
        Dataset.load(folder)


def test_wrong_types(folder: Path) -> None:
    table(folder, text=[1, 2])
    with pytest.raises(DataError, match="column 'text' is int64"):
        Dataset.load(folder)
    table(folder, item=["x", None])
    with pytest.raises(DataError, match="column 'item' is empty in data row 2"):
        Dataset.load(folder)


def test_missing_file(folder: Path) -> None:
    (folder / "interactions.parquet").unlink()
    with pytest.raises(DataError, match=r"interactions\.parquet: there is no such file"):
        Dataset.load(folder)


def test_nothing_to_write(tmp_path: Path) -> None:
    nothing = np.empty(0, object)
    with pytest.raises(DataError, match="at least one item"):
        write_dataset(tmp_path, interactions(), Items(nothing, nothing, nothing))
    with pytest.raises(DataError, match="one interaction"):
        write_dataset(tmp_path, Interactions(nothing, nothing, np.empty(0, np.int64)), items())


@pytest.mark.parametrize(
    "users, taken, times, message",
    [
        ("ab", "xy", [-5, 3], r"interactions\.parquet: column 'timestamp' holds '-5' in data row 1"),
        (["a", ""], "xy", [1, 3], r"interactions\.parquet: column 'user' is empty in data row 2"),
        (["a", None], "xy", [1, 3], r"interactions\.parquet: column 'user' is empty in data row 2"),
        ("ab", ["", "y"], [1, 3], r"interactions\.parquet: column 'item' is empty in data row 1"),
        ("ab", "xy", np.array([1, 2**63], np.uint64), r"column 'timestamp' cannot be written as int64"),
        ([1, 2], "xy", [1, 3], r"column 'user' cannot be written as string"),
        (["a", "\ud800"], "xy", [1, 3], r"column 'user' cannot be written as string"),
    ],
)
def test_interactions_that_could_not_be_loaded_are_not_written(
    tmp_path: Path, users: list, taken: list, times: list, message: str
) -> None:
    log = Interactions(strings(*users), strings(*taken), np.asarray(times))
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path / "new", log, items())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["", None])
def test_items_without_an_id_are_not_written(tmp_path: Path, name: str | None) -> None:
    bad = Items(strings("x", "y", name), *[strings(None, None, None)] * 2)
    with pytest.raises(DataError, match=r"items\.parquet: column 'item' is empty in data row 3"):
        write_dataset(tmp_path / "new", interactions(), bad)
    assert not (tmp_path / "new").exists()


def test_what_is_written_is_returned_as_it_is_loaded(tmp_path: Path) -> None:
    blank = Items(strings("x", "y"), strings("", "b"), strings("", None))
    for dataset in (write_dataset(tmp_path, interactions(), blank), Dataset.load(tmp_path)):
        assert dataset.items.texts.tolist() == [None, "b"]
        assert dataset.items.images.tolist() == [None, None]


def test_items_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="one length, not 2, 1 and 2"):
        Items(strings("x", "y"), strings("a"), strings(None, None))
