"""Datasets out of raw files."""

import os
from pathlib import Path

import numpy as np

from xsmoe.cli.display import Display
from xsmoe.data import (
    DataError,
    Dataset,
    Items,
    LogSummary,
    prepare_movielens,
    read_interactions,
    summarize_log,
    write_catalogue,
    write_dataset,
)
from xsmoe.data.tables import column_names, id_strings, optional_strings, read_table
from xsmoe.data.times import iso_day


def movielens(source: Path, out: Path, display: Display) -> None:
    """A MovieLens release in CSV form as a dataset."""
    _describe(prepare_movielens(source, out), display)


def catalogue(
    out: Path, display: Display, *, seed: int, windows: int, users: int, items: int, returning: int = 0
) -> None:
    """The drifting catalogue as a dataset, or one of so many regimes that return."""
    with display.progress("Drawing the catalogue") as advance:
        dataset = write_catalogue(
            out, seed=seed, num_windows=windows, users=users, items=items, returning=returning, progress=advance
        )
    _describe(dataset, display)


def table(
    out: Path,
    display: Display,
    *,
    interactions: Path,
    items: Path,
    columns: dict[str, str],
    text_column: str | None,
    image_column: str | None,
    images_root: Path | None,
) -> None:
    """Two tables as a dataset.

    Args:
        out: the dataset's folder.
        display: where to say what came of it.
        interactions, items: .csv or .parquet files.
        columns: what "user", "item" and "timestamp" are called.
        text_column, image_column: of the items; None takes "text" and "image" where they are there.
        images_root: what image paths are relative to; default the folder of `items`.
    """
    log = read_interactions(interactions, **columns)
    listed = read_items(
        items,
        out,
        item_column=columns["item"],
        text_column=text_column,
        image_column=image_column,
        images_root=images_root,
    )
    _describe(write_dataset(out, log, listed), display)


def read_items(
    path: Path,
    folder: Path,
    *,
    item_column: str = "item",
    text_column: str | None = None,
    image_column: str | None = None,
    images_root: Path | None = None,
) -> Items:
    """Items out of a .csv or .parquet file.

    Args:
        path: the file.
        folder: the dataset's, which the image paths of the result are relative to. Images stay where they are.
        item_column: the ids' column.
        text_column, image_column: None takes "text" and "image" where the file has them.
        images_root: what the file's image paths are relative to; default the file's folder.

    Raises:
        DataError: the file cannot be read, lacks a column, or has neither texts nor images.
    """
    names = column_names(path)
    chosen = {
        "text": text_column or ("text" if "text" in names else None),
        "image": image_column or ("image" if "image" in names else None),
    }
    wanted = {item_column: "Rename it, or name the right one with --item-column of `xsmoe prepare table`."}
    if item_column in names and not any(chosen.values()):
        raise DataError(
            f"{path}: has neither texts nor images; its columns are {', '.join(names)}. Name one text or image, or "
            "use --text-column or --image-column of `xsmoe prepare table`"
        )
    for kind, name in chosen.items():
        if name is not None:
            wanted.setdefault(name, f"Name the right one with --{kind}-column.")
    # A path or an id is no text, whatever else the column is used for.
    text = {chosen["text"]} - {None, chosen["image"], item_column}
    table = read_table(path, wanted, text={name for name in text if name is not None})
    ids = id_strings(path, item_column, table.columns[item_column])
    found = {
        kind: np.full(len(ids), None, dtype=object)
        if name is None
        else optional_strings(path, name, table.columns[name])
        for kind, name in chosen.items()
    }
    root, here = (images_root or path.parent).resolve(), folder.resolve()
    for place in np.flatnonzero(found["image"] != None):  # noqa: E711 - element by element
        found["image"][place] = os.path.relpath(root / found["image"][place], here)
    return Items(ids, found["text"], found["image"], table.notes)


def _describe(dataset: Dataset, display: Display) -> None:
    log, items = dataset.interactions, dataset.items
    for note in (*log.notes, *items.notes):
        display.say(note)
    counts = summarize_log(log)
    texts, images = (sum(value is not None for value in column) for column in (items.texts, items.images))
    display.say(
        f"{dataset.folder}: {counts.rows} interactions of {counts.users} users with {len(items)} items "
        f"({texts} with a text, {images} with an image)"
    )
    display.say(log_line(counts))


def log_line(counts: LogSummary) -> str:
    """What is counted of a log, as one line."""
    return (
        f"The log: {counts.rows} rows from {iso_day(counts.first)} to {iso_day(counts.last)}, {counts.users} users, "
        f"{counts.items} items, {counts.duplicates} exact duplicates, {counts.repeats} repeats of a user's item at "
        f"another time; {100 * counts.shared_time:.1f} % share their time with another interaction of the same user"
    )
