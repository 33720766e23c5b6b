"""Command `xsmoe update`: update a run with new interactions, users and items."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xsmoe.cli.commands.encode import encode_more
from xsmoe.cli.commands.prepare import read_items
from xsmoe.cli.commands.train import cut_settings, run_trainer, say_dropped, say_notes, say_ties
from xsmoe.cli.display import Display
from xsmoe.cli.run_config import RunConfig, check_device, read_users, write_users
from xsmoe.cli.seen_interactions import read_seen, write_seen
from xsmoe.data import Dataset, Interactions, Items, Window, read_interactions, write_dataset
from xsmoe.data.repeats import seen_before
from xsmoe.data.times import differ_in_unit
from xsmoe.encoders import HiddenStateStore
from xsmoe.stream import Stream, StreamingTrainer
from xsmoe.stream.profiling import require_writable_folder
from xsmoe.stream.state.run_folder import read_metrics, read_window, window_digest

SHOWN_ROWS = 5


def update(
    folder: Path,
    interactions: Path,
    items: Path | None,
    images_root: Path | None,
    encoders: Mapping[str, str],
    display: Display,
    *,
    profile: Path | None = None,
) -> None:
    """Use new interactions as the run's next window: test the model on them, grow it and train it.

    New items are encoded first and appended to the store and to the dataset. New users are numbered after the known
    ones. Every step is done once, even if the command is repeated.

    Args:
        folder: folder of the run. All windows of its dataset must be finished.
        interactions: a .csv or .parquet file with the columns user, item and timestamp. The run must not have received
            any of its rows before, in any unit of time.
        items: a .csv or .parquet file with the columns item, text and image. Known items are skipped.
        images_root: base folder of relative image paths; None selects the folder of `items`.
        encoders: locations of encoders by modality, if they differ from the recorded ones.
        display: display of the command.
        profile: folder for a profile of the first steps; None disables it.

    Raises:
        ValueError: a file is invalid, the run is not ready, or an encoder differs from the store's encoder.
    """
    config = RunConfig.read(folder)
    check_device(config.stream.device)
    if profile is not None:
        require_writable_folder(profile)
    number = sum(line["kind"] == "window" for line in read_metrics(folder))
    if number < config.windows:
        raise ValueError(
            f"{folder} has finished {number} of its {config.windows} windows; finish `xsmoe train {folder}` first"
        )
    log = read_interactions(interactions)
    store = HiddenStateStore.open(config.store)
    if items is not None:
        _add_items(config, store, items, images_root, encoders, display)
        store = HiddenStateStore.open(config.store)
    windows = [read_window(folder, window) for window in range(number)]
    known = read_users(folder, windows)
    stream = Stream.next_window(
        log,
        store,
        number,
        known,
        modalities=config.modalities,
        missing=config.missing,
        **cut_settings(config),
    )
    say_notes(log.notes, display)
    say_dropped(stream, display)
    say_ties(log, config, display)
    window = stream.windows[0]

    def train_window(trainer: StreamingTrainer) -> None:
        done = trainer.progress.digests[: trainer.windows_done]
        if window_digest(window) in done:
            display.say(
                f"Nothing to do: the run was already trained on these interactions, as its window "
                f"{done.index(window_digest(window))}."
            )
            return
        if len(done) != number or read_users(folder, windows).tolist() != known.tolist():
            raise ValueError(f"{folder} has changed since the command was started; run the command again")
        trainer.check(window)
        seen = read_seen(folder, config, windows, known, store)
        _require_new(interactions, config, log, window, seen, display)
        # Written only while the trainer holds the lock, and only for a window that it accepts.
        write_seen(folder, number, log)
        write_users(folder, stream.user_ids)
        trainer.step(window)

    run_trainer(folder, config, stream, display, train_window, of=number + 1, show_past=False, profile=profile)


def _require_new(
    path: Path, config: RunConfig, log: Interactions, window: Window, seen: Sequence[Interactions], display: Display
) -> None:
    """Raise ValueError if the run has received interactions before, or if none can be used for training.

    Args:
        path: path of the file, for messages.
        config: settings of the run.
        log: all interactions of the file, including those that are not part of the window.
        window: the next window.
        seen: all logs that the run has received before.
        display: display of the command.
    """
    latest, newest = max(int(before.timestamps[-1]) for before in seen), int(log.timestamps[-1])
    if differ_in_unit(latest, newest):
        raise ValueError(
            f"{path}: the largest 'timestamp' is {newest}, but {latest} in the run's interactions, which is another "
            "unit; convert the column to the run's unit"
        )
    again = np.logical_or.reduce([seen_before(log, before) for before in seen])
    if again.any():
        rows = np.sort(log.rows[again])
        shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
        raise ValueError(
            f"{path}: {len(rows)} of {len(log)} interactions were given to the run before, maybe in another unit of "
            f"time, or were left out of its windows; remove them and give only new ones: data rows {shown}"
        )
    if not len(config.stream.split(window).train):
        raise ValueError(
            f"{path}: no training data, because no user has {config.stream.k_core} interactions (the run's k_core) "
            "with 2 of them in the training split; add more interactions"
        )
    if older := int((window.timestamps < latest).sum()):
        display.warn(f"{older} of {len(window)} interactions are older than the latest one that the run was trained on")


def _add_items(
    config: RunConfig,
    store: HiddenStateStore,
    path: Path,
    images_root: Path | None,
    encoders: Mapping[str, str],
    display: Display,
) -> None:
    dataset = Dataset.load(config.dataset)
    given = read_items(path, config.dataset, images_root=images_root)
    say_notes(given.notes, display)
    rows = dict(zip(dataset.items.ids, range(len(dataset.items)), strict=True))
    known = np.array([item in rows for item in given.ids], dtype=bool)
    for place in np.flatnonzero(known):
        row = rows[given.ids[place]]
        if given.texts[place] != dataset.items.texts[row]:
            raise ValueError(
                f"{path}: item {given.ids[place]!r} is known with another text; an encoded item cannot change, so "
                "leave it out or use a new id"
            )
    if (store.index_of(given.ids) < 0).any():
        encode_more(given, config.dataset, store, encoders, display)
    if not known.all():
        fresh = ~known
        old = dataset.items
        grown = Items(
            np.concatenate([old.ids, given.ids[fresh]]),
            np.concatenate([old.texts, given.texts[fresh]]),
            np.concatenate([old.images, given.images[fresh]]),
        )
        write_dataset(dataset.folder, dataset.interactions, grown)
