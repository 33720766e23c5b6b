"""Datasets out of raw files."""

import os
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet

from xsmoe.app.display import Display
from xsmoe.data import (
    DataError,
    Dataset,
    Items,
    prepare_movielens,
    read_interactions,
    write_catalogue,
    write_dataset,
)
from xsmoe.data.tables import id_strings, optional_strings, read_columns


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
    wanted = {item_column: "Rename it, or name the right one with --item-column of `xsmoe prepare table`."}
    ids = id_strings(path, item_column, read_columns(path, wanted)[item_column])
    names = _column_names(path)
    chosen = {
        "text": text_column or ("text" if "text" in names else None),
        "image": image_column or ("image" if "image" in names else None),
    }
    if not any(chosen.values()):
        raise DataError(
            f"{path}: has neither texts nor images; its columns are {', '.join(names)}. Name one text or image, or "
            "use --text-column or --image-column of `xsmoe prepare table`"
        )
    found = {kind: np.full(len(ids), None, dtype=object) for kind in chosen}
    for kind, name in chosen.items():
        if name is not None:
            column = read_columns(path, {name: f"Name the right one with --{kind}-column."})[name]
            found[kind] = optional_strings(path, name, column)
    root, here = (images_root or path.parent).resolve(), folder.resolve()
    for place in np.flatnonzero(found["image"] != None):  # noqa: E711 - element by element
        found["image"][place] = os.path.relpath(root / found["image"][place], here)
    return Items(ids, found["text"], found["image"])


def _column_names(path: Path) -> list[str]:
    if path.suffix.lower() == ".parquet":
        return list(pyarrow.parquet.read_schema(path).names)
    with pyarrow.csv.open_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)) as reader:
        return list(reader.schema.names)


def _describe(dataset: Dataset, display: Display) -> None:
    log, items = dataset.interactions, dataset.items
    texts, images = (sum(value is not None for value in column) for column in (items.texts, items.images))
    display.say(
        f"{dataset.folder}: {len(log)} interactions of {len(set(log.users))} users with {len(items)} items "
        f"({texts} with a text, {images} with an image)"
    )
