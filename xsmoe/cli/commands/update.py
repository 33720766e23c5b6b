"""A run goes on with what has arrived: new interactions, and with them new users and new items."""

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
from xsmoe.stream.profiling import require_folder
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
    """Take new interactions as the run's next window: tests on them, grows and trains.

    New items are encoded and appended to the store and to the dataset first; new users are numbered behind those that
    are known. Every step is done once, however often the command is given.

    Args:
        folder: of the run, all windows of whose dataset are done.
        interactions: a .csv or .parquet file with the columns user, item and timestamp. None of its rows may be among
            those that the run was given before, in whatever unit of time.
        items: a .csv or .parquet file with the columns item, text and image, of items that may be new.
        images_root: what image paths are relative to; default the folder of `items`.
        encoders: where encoders lie, by modality, if not where they were.
        display: where progress is shown.
        profile: the folder of a profile of the first steps; None for none.

    Raises:
        ValueError: a mistake in the files, a run that is not ready, or encoders that are not the store's.
    """
    config = RunConfig.read(folder)
    check_device(config.stream.device)
    if profile is not None:
        require_folder(profile)
    number = sum(line["kind"] == "window" for line in read_metrics(folder))
    if number < config.windows:
        raise ValueError(
            f"{folder} has trained {number} of its {config.windows} windows; finish `xsmoe train {folder}` first"
        )
    log = read_interactions(interactions)
    store = HiddenStateStore.open(config.store)
    if items is not None:
        _add_items(config, store, items, images_root, encoders, display)
        store = HiddenStateStore.open(config.store)
    taken = [read_window(folder, window) for window in range(number)]
    known = read_users(folder, taken)
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

    def take(trainer: StreamingTrainer) -> None:
        done = trainer.progress.digests[: trainer.windows_done]
        if window_digest(window) in done:
            display.say(
                f"Nothing to do: the run has been trained on these interactions, as its window "
                f"{done.index(window_digest(window))}."
            )
            return
        if len(done) != number or read_users(folder, taken).tolist() != known.tolist():
            raise ValueError(f"{folder} has changed since the command began; give it again")
        trainer.check(window)
        seen = read_seen(folder, config, taken, known, store)
        _require_new(interactions, config, log, window, seen, display)
        # Under the trainer's lock, and only for a window that it takes.
        write_seen(folder, number, log)
        write_users(folder, stream.user_ids)
        trainer.step(window)

    run_trainer(folder, config, stream, display, take, of=number + 1, show_past=False, profile=profile)


def _require_new(
    path: Path, config: RunConfig, log: Interactions, window: Window, seen: Sequence[Interactions], display: Display
) -> None:
    """Refuse interactions that the run was given before, and those of which none can be trained on.

    Args:
        path: of the file, for messages.
        config: of the run.
        log: what the file holds, also what does not enter the window.
        window: what is to be trained on.
        seen: what the run was given before.
        display: where warnings are shown.
    """
    latest, newest = max(int(before.timestamps[-1]) for before in seen), int(log.timestamps[-1])
    if differ_in_unit(latest, newest):
        raise ValueError(
            f"{path}: column 'timestamp' goes up to {newest}, but that of the run's interactions up to {latest}, which "
            "is another unit; convert the column to the run's"
        )
    again = np.logical_or.reduce([seen_before(log, before) for before in seen])
    if again.any():
        rows = np.sort(log.rows[again])
        shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
        raise ValueError(
            f"{path}: {len(rows)} of {len(log)} interactions are in the run's windows already; give only new ones. "
            f"They were given before, perhaps in another unit of time or left out of the windows: data rows {shown}"
        )
    if not len(config.stream.split(window).train):
        raise ValueError(
            f"{path}: nobody to train on, since no user has {config.stream.k_core} interactions (the run's k_core) "
            "with 2 of them in its first part; wait until more have come"
        )
    if older := int((window.timestamps < latest).sum()):
        display.warn(
            f"{older} of {len(window)} interactions are older than the latest that the run has been trained on"
        )


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
                f"{path}: item {given.ids[place]!r} is known with another text; an item's contents stay what they were "
                "when it was encoded, so leave it out or give it a new id"
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
