"""Command `xsmoe prepare`: create datasets from raw files."""

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
    """Create a dataset from a MovieLens release in CSV format."""
    _describe(prepare_movielens(source, out), display)


def catalogue(
    out: Path, display: Display, *, seed: int, windows: int, users: int, items: int, returning: int = 0
) -> None:
    """Create a synthetic dataset: a drifting catalogue, or one with `returning` taste regimes."""
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
    """Create a dataset from two tables.

    Args:
        out: the dataset's folder.
        display: display of the command.
        interactions, items: .csv or .parquet files.
        columns: names of the columns "user", "item" and "timestamp".
        text_column, image_column: columns of the items; None selects "text" and "image" if they exist.
        images_root: base folder of relative image paths; None selects the folder of `items`.
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
    """Read items from a .csv or .parquet file.

    Args:
        path: the file.
        folder: the dataset's folder. Image paths of the result are relative to it. Images are not copied.
        item_column: column of the ids.
        text_column, image_column: None selects "text" and "image" if the file has them.
        images_root: base folder of the file's relative image paths; None selects the file's folder.

    Raises:
        DataError: the file cannot be read, lacks a column, or has neither texts nor images.
    """
    names = column_names(path)
    chosen = {
        "text": text_column or ("text" if "text" in names else None),
        "image": image_column or ("image" if "image" in names else None),
    }
    wanted = {item_column: "Rename it, or use --item-column of `xsmoe prepare table`."}
    if item_column in names and not any(chosen.values()):
        raise DataError(
            f"{path}: has neither texts nor images; its columns are {', '.join(names)}. Rename a column to text or "
            "image, or use --text-column or --image-column of `xsmoe prepare table`"
        )
    for kind, name in chosen.items():
        if name is not None:
            wanted.setdefault(name, f"Use --{kind}-column.")
    # Columns of paths or ids are not parsed as texts, even if they are also the text column.
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
    """Return the counts of a log as one line."""
    return (
        f"The log: {counts.rows} rows from {iso_day(counts.first)} to {iso_day(counts.last)}, {counts.users} users, "
        f"{counts.items} items, {counts.duplicates} exact duplicates, {counts.repeats} repeats of a user's item at "
        f"another time; {100 * counts.shared_time:.1f} % share their time with another interaction of the same user"
    )
