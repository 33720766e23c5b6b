"""Every interaction that a run was given: the dataset's log, its windows, and the logs of its updates."""

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
    """What the run in `folder` was given, as logs. Those of an update that was not finished are left out.

    The dataset's log and those of updates also hold what did not enter a window; the windows are there too, because the
    dataset may have changed since, and because updates by an earlier version kept no log.

    Args:
        folder, config: of the run.
        windows: those it has taken, at least one.
        users: the user that each integer stands for.
        store: whose rows the windows' items are.

    Raises:
        DataError: a log is missing or damaged, or the windows hold times in another unit than seconds.
    """
    who, what, when = (
        np.concatenate([getattr(window, name) for window in windows]) for name in ("users", "items", "timestamps")
    )
    if (to_seconds(folder, "timestamp", when)[0] != when).any():
        raise DataError(
            f"the windows of {folder} hold times in another unit than seconds, as an earlier version took them; start "
            "another run, which converts them"
        )
    seen = [Interactions.in_time_order(users[who], store.item_ids[what], when)]
    logs = [config.dataset / INTERACTIONS, *(_path(folder, window.number) for window in windows[config.windows :])]
    # Where an earlier version made the update, there is no log of it.
    return seen + [read_interactions(path) for path in logs if path.parent.name != UPDATES or path.is_file()]


def write_seen(folder: Path, number: int, log: Interactions) -> None:
    """Keep the log of an update: each row's user, item, time and number in its file.

    Args:
        folder: of the run.
        number: the window's place in the stream.
        log: all that was given, also what does not enter the window.
    """
    names = {"user": pa.array(log.users, pa.string()), "item": pa.array(log.items, pa.string())}
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table(names | {"timestamp": log.timestamps, "row": log.rows}), sink)
    path = _path(folder, number)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def _path(folder: Path, number: int) -> Path:
    return folder / UPDATES / f"{number:04d}.parquet"
