"""Interaction logs in the command line: counts, dropped rows, conversions and errors."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

from tests.cli.helpers import Place, run, succeed, train_arguments
from xsmoe.cli.run_config import RunConfig, read_users
from xsmoe.cli.seen_interactions import read_seen
from xsmoe.data import DataError
from xsmoe.encoders import HiddenStateStore
from xsmoe.stream.state.run_folder import read_metrics, read_window

pytestmark = pytest.mark.usefixtures("one_plot")

Copy = Callable[[Place], Place]


def rows_of(path: Path) -> list[tuple[str, str, int]]:
    table = pyarrow.csv.read_csv(path)
    return list(zip(*(table[name].to_pylist() for name in ("user", "item", "timestamp")), strict=True))


def write(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    path.write_text("user,item,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows))
    return path


def prepare(place: Place, log: Path) -> str:
    items = place.root / "raw" / "items.parquet"
    return succeed("prepare", "table", place.root / "again", "--interactions", log, "--items", items)


def test_prepare_keeps_every_row_and_counts(prepared: Place, copy_of: Copy) -> None:
    place = copy_of(prepared)
    log = write(
        place.root / "log.csv",
        [("a", "i1", 1_600_000_500), ("a", "i2", 1_600_000_500), *[("b", "i1", 1_600_000_000)] * 2],
    )
    out = prepare(place, log)
    assert "4 interactions of 2 users with 60 items" in out
    assert "4 rows from 2020-09-13 to 2020-09-13, 2 users, 2 items, 1 exact duplicates, 0 repeats" in out
    assert "66.7 % share their time with another interaction of the same user" in out
    table = pyarrow.parquet.read_table(place.root / "again" / "interactions.parquet")
    assert table["row"].to_pylist() == [3, 4, 1, 2]


def test_prepare_reports_conversions(prepared: Place, copy_of: Copy) -> None:
    place = copy_of(prepared)
    rows = [(user, item, 1000 * time) for user, item, time in rows_of(place.root / "raw" / "log.csv")]
    out = prepare(place, write(place.root / "log.csv", rows))
    assert out.count("holds milliseconds; converted to seconds, from 2020-09-13 to 2020-09-14") == 1
    again, before = (folder / "interactions.parquet" for folder in (place.root / "again", place.dataset))
    assert pyarrow.parquet.read_table(again).equals(pyarrow.parquet.read_table(before))


def test_dataset_of_an_earlier_version_can_be_trained(prepared: Place, copy_of: Copy) -> None:
    """Earlier versions wrote no row numbers and did not convert milliseconds."""
    place = copy_of(prepared)
    path = place.dataset / "interactions.parquet"
    old = pyarrow.parquet.read_table(path)
    times = pyarrow.array(np.asarray(old["timestamp"]) * 1000)
    pyarrow.parquet.write_table(old.drop_columns("row").set_column(2, "timestamp", times), path)
    out = succeed(*train_arguments(place), "--epochs", 1, "--warmup-epochs", 0)
    assert "holds milliseconds; converted to seconds" in out
    assert read_window(place.run, 0).timestamps[0] == 1_600_000_000


def test_train_reports_dropped_duplicates(prepared: Place, copy_of: Copy) -> None:
    place = copy_of(prepared)
    rows = rows_of(place.root / "raw" / "log.csv")
    prepare(place, write(place.root / "log.csv", [row for row in rows for _ in range(2)]))
    shutil.rmtree(place.dataset)
    (place.root / "again").rename(place.dataset)
    out = succeed(*train_arguments(place), "--epochs", 1, "--warmup-epochs", 0)
    assert f"{len(rows)} interactions are left out: another one has the same user, item and time" in out
    assert sum(len(read_window(place.run, number)) for number in range(3)) == len(rows)


@pytest.mark.parametrize("ties", ["hash", "file"])
def test_train_warns_if_the_file_order_can_be_learned(prepared: Place, copy_of: Copy, ties: str) -> None:
    place = copy_of(prepared)
    rows = rows_of(place.root / "raw" / "log.csv")
    days = [(user, item, time // 86_400 * 86_400) for user, item, time in sorted(rows, key=lambda row: row[1])]
    prepare(place, write(place.root / "log.csv", days))
    shutil.rmtree(place.dataset)
    (place.root / "again").rename(place.dataset)
    outcome = run(*train_arguments(place), "--epochs", 1, "--warmup-epochs", 0, "--ties", ties)
    assert outcome.code == 0, outcome
    message = "100.0 % of interactions have the same time as another one of the same user and keep the file's order"
    assert (message in " ".join((outcome.out + outcome.err).split())) == (ties == "file")


@pytest.mark.parametrize("factor", [1, 10**3, 10**6, 10**9])
def test_update_detects_repeated_interactions_in_any_unit(trained: Place, copy_of: Copy, factor: int) -> None:
    place = copy_of(trained)
    again = rows_of(place.root / "raw" / "log.csv")[7:10]
    mixed = [(user, item, time * factor) for user, item, time in [*rows_of(place.more), *again]]
    outcome = run("update", place.run, "--interactions", write(place.root / "mixed.csv", mixed))
    assert outcome.code == 2
    assert "3 of 153 interactions were given to the run before" in outcome.err
    assert "data rows 151, 152, 153" in outcome.err


@pytest.mark.parametrize("unit", [60, 86_400])
def test_update_rejects_minutes_and_days(trained: Place, copy_of: Copy, unit: int) -> None:
    """These units are not recognized, so interactions that were given before would not be found."""
    place = copy_of(trained)
    rows = [(user, item, time // unit) for user, item, time in rows_of(place.root / "raw" / "log.csv")]
    outcome = run("update", place.run, "--interactions", write(place.root / "coarse.csv", rows))
    assert outcome.code == 2
    assert f"the largest 'timestamp' is {rows[-1][2]}, but 16000" in outcome.err
    assert "convert the column to the run's unit" in outcome.err
    assert [line["window"] for line in read_metrics(place.run) if line["kind"] == "window"] == [0, 1, 2]


def test_update_in_another_unit_is_the_same_window(trained: Place, copy_of: Copy) -> None:
    place = copy_of(trained)
    succeed("update", place.run, "--interactions", place.more)
    fine = [(user, item, 1000 * time + 5) for user, item, time in rows_of(place.more)]
    out = succeed("update", place.run, "--interactions", write(place.root / "fine.csv", fine[::-1]))
    assert "holds milliseconds; converted to seconds" in out
    assert "Nothing to do: the run was already trained on these interactions, as its window 3" in out


def test_update_detects_repeated_interactions_outside_of_the_windows(trained: Place, copy_of: Copy) -> None:
    """Their items were not in the store when they were first given."""
    place = copy_of(trained)
    later = rows_of(place.more)
    unknown = [number for number, row in enumerate(later) if row[1] in ("i60", "i61")]
    assert unknown
    assert "their items are not in the store" in succeed("update", place.run, "--interactions", place.more)
    fresh = [(user, "i1", 1_710_000_000 + number) for number in range(10) for user in ("u1", "u2", "u3")]
    again = write(place.root / "again.csv", [*fresh, *(later[number] for number in unknown)])
    outcome = run("update", place.run, "--interactions", again, "--items", place.more_items)
    assert outcome.code == 2
    assert f"{len(unknown)} of {30 + len(unknown)} interactions were given to the run before" in outcome.err
    succeed("update", place.run, "--interactions", write(again, fresh))
    assert [line["window"] for line in read_metrics(place.run) if line["kind"] == "window"] == [0, 1, 2, 3, 4]


def test_update_detects_interactions_of_an_update_without_a_log(trained: Place, copy_of: Copy) -> None:
    """Earlier versions saved the windows only."""
    place = copy_of(trained)
    succeed("update", place.run, "--interactions", place.more)
    shutil.rmtree(place.run / "updates")
    known = [row for row in rows_of(place.more) if row[1] not in ("i60", "i61")][:2]
    again = write(place.root / "again.csv", [("u1", "i1", 1_710_000_000), *known])
    assert "2 of 3 interactions were given to the run before" in run("update", place.run, "--interactions", again).err


def test_windows_in_another_unit_are_rejected(trained: Place) -> None:
    """Earlier versions did not convert times, so a run may have milliseconds."""
    config = RunConfig.read(trained.run)
    windows = [read_window(trained.run, number) for number in range(3)]
    users, store = read_users(trained.run, windows), HiddenStateStore.open(trained.store)
    assert [len(log) for log in read_seen(trained.run, config, windows, users, store)] == [900, 900]
    windows = [replace(window, timestamps=window.timestamps * 1000) for window in windows]
    with pytest.raises(DataError, match="have times in another unit than seconds"):
        read_seen(trained.run, config, windows, users, store)


def test_evaluate_reads_all_units_and_rejects_open_quotes(trained: Place, copy_of: Copy) -> None:
    place = copy_of(trained)
    fine = write(place.root / "fine.csv", [(user, item, 1000 * time) for user, item, time in rows_of(place.more)])
    mine, theirs = (succeed("evaluate", place.run, "--interactions", log).splitlines() for log in (place.more, fine))
    assert "holds milliseconds" in theirs[0]
    assert theirs[1:] == mine
    fine.write_text(fine.read_text() + 'u1,i1,"1700000000000\n')
    outcome = run("evaluate", place.run, "--interactions", fine)
    assert outcome.code == 2
    assert "line 152 opens a quoted field that no quote closes" in outcome.err
