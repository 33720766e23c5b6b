"""All interactions that a run has received: the dataset's log, its windows, and the logs of its updates."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from xsmoe.cli.run_config import RunConfig
from xsmoe.data import DataError, Interactions, Window, read_interactions
from xsmoe.data.dataset import INTERACTIONS
from xsmoe.data.times import to_seconds
from xsmoe.encoders import HiddenStateStore
from xsmoe.stream.state.checkpoints import write_atomically

UPDATES = "updates"


def read_seen(
    folder: Path, config: RunConfig, windows: Sequence[Window], users: np.ndarray, store: HiddenStateStore
) -> list[Interactions]:
    """Read all logs that the run in `folder` has received, except the log of an unfinished update.

    The logs of the dataset and of updates include interactions that are not part of a window. The windows are read too,
    because the dataset may have changed, and because earlier versions did not save the logs of updates.

    Args:
        folder, config: folder and settings of the run.
        windows: windows of the run, at least one.
        users: the user name for each integer id.
        store: the items of the windows are its rows.

    Raises:
        DataError: a log is missing or damaged, or the windows have times in another unit than seconds.
    """
    who, what, when = (
        np.concatenate([getattr(window, name) for window in windows]) for name in ("users", "items", "timestamps")
    )
    if (to_seconds(folder, "timestamp", when)[0] != when).any():
        raise DataError(
            f"the windows of {folder} have times in another unit than seconds, because an earlier version did not "
            "convert them; start a new run, which converts them"
        )
    seen = [Interactions.in_time_order(users[who], store.item_ids[what], when)]
    logs = [config.dataset / INTERACTIONS, *(_path(folder, window.number) for window in windows[config.windows :])]
    # Updates by an earlier version have no log.
    return seen + [read_interactions(path) for path in logs if path.parent.name != UPDATES or path.is_file()]


def write_seen(folder: Path, number: int, log: Interactions) -> None:
    """Save the log of an update: user, item, time and row number of each interaction.

    Args:
        folder: folder of the run.
        number: position of the window in the stream.
        log: all interactions of the update, including those that are not part of the window.
    """
    names = {"user": pa.array(log.users, pa.string()), "item": pa.array(log.items, pa.string())}
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table(names | {"timestamp": log.timestamps, "row": log.rows}), sink)
    path = _path(folder, number)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def _path(folder: Path, number: int) -> Path:
    return folder / UPDATES / f"{number:04d}.parquet"
