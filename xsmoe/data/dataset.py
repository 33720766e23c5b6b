"""A dataset on disk: a folder with interactions.parquet, items.parquet and the images that items.parquet names."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from xsmoe.data.errors import DataError
from xsmoe.data.interactions import Interactions, parse_interactions
from xsmoe.data.tables import Table, column_names, id_strings, optional_strings, read_table

INTERACTIONS = "interactions.parquet"
ITEMS = "items.parquet"
ROW = "row"


@dataclass(frozen=True)
class Items:
    """The text and image of each item. An item may lack its text, its image, or both.

    Attributes:
        ids: (N,) object array of str, distinct.
        texts: (N,) object array of str, None where an item has no text.
        images: (N,) object array of str, each the path of an image file relative to the dataset's folder, or None.
        notes: sentences about unusual content of the source file.

    Raises:
        ValueError: the arrays have different lengths.
    """

    ids: np.ndarray
    texts: np.ndarray
    images: np.ndarray
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.texts) == len(self.images):
            raise ValueError(
                f"ids, texts and images must have one length, not {len(self.ids)}, {len(self.texts)} and "
                f"{len(self.images)}"
            )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Dataset:
    """A checked dataset: item ids are distinct, and they include every interaction's item.

    The existence of the image files is not checked.
    """

    folder: Path
    interactions: Interactions
    items: Items

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Dataset":
        """Read a dataset's folder.

        Its files are `interactions.parquet` (user, item, timestamp, row) and `items.parquet` (item, text, image), where
        text and image may be null; an empty string counts as null. `row` is an interaction's data row in its source
        file. Without that column, the rows of interactions.parquet are numbered from 1.

        Raises:
            DataError: a file or column is missing, a type is wrong, a row has no id, an item occurs twice, an image
                path is absolute, or an interaction's item is not in items.parquet.
        """
        folder = Path(folder)
        path = folder / ITEMS
        advice = "A dataset's items have the columns item, text and image; text and image may hold nulls."
        items = _parse_items(path, read_table(path, dict.fromkeys(("item", "text", "image"), advice)))
        path = folder / INTERACTIONS
        wanted = dict.fromkeys(
            ("user", "item", "timestamp"), "A dataset's interactions are written by `xsmoe prepare`."
        )
        if ROW in column_names(path):
            wanted[ROW] = "It holds row numbers."
        interactions = _parse_interactions(path, read_table(path, wanted))
        _check(folder, interactions, items)
        return cls(folder, interactions, items)


def write_dataset(folder: str | PathLike[str], interactions: Interactions, items: Items) -> Dataset:
    """Write a dataset into a folder. The folder is created if it is missing. The caller adds the images.

    Each file is first written under a temporary name and then renamed, so a reader never finds a part of a file.

    Returns:
        The dataset as `Dataset.load` returns it.

    Raises:
        DataError: `Dataset.load` would refuse the dataset.
    """
    folder = Path(folder)
    if not len(items) or not len(interactions):
        raise DataError(f"{folder}: a dataset needs at least one item and one interaction")
    tables = {
        ITEMS: _table(folder / ITEMS, {"item": items.ids, "text": items.texts, "image": items.images}),
        INTERACTIONS: _table(
            folder / INTERACTIONS,
            {
                "user": interactions.users,
                "item": interactions.items,
                "timestamp": interactions.timestamps,
                ROW: interactions.rows,
            },
        ),
    }
    read = {
        name: Table(dict(zip(table.column_names, table.columns, strict=True)), ()) for name, table in tables.items()
    }
    items = replace(_parse_items(folder / ITEMS, read[ITEMS]), notes=items.notes)
    log = _parse_interactions(folder / INTERACTIONS, read[INTERACTIONS])
    interactions = replace(log, notes=interactions.notes or log.notes)
    table = tables[INTERACTIONS]
    place = table.column_names.index("timestamp")
    tables[INTERACTIONS] = table.set_column(place, "timestamp", pa.array(interactions.timestamps))
    _check(folder, interactions, items)
    folder.mkdir(parents=True, exist_ok=True)
    written = {folder / f".{name}.{os.getpid()}.tmp": folder / name for name in tables}
    try:
        for temporary, final in written.items():
            pa.parquet.write_table(tables[final.name], temporary)
        for temporary, final in written.items():
            temporary.replace(final)
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)
    return Dataset(folder, interactions, items)


def _parse_items(path: Path, table: Table) -> Items:
    columns = table.columns
    return Items(
        ids=id_strings(path, "item", columns["item"]),
        texts=optional_strings(path, "text", columns["text"]),
        images=optional_strings(path, "image", columns["image"]),
        notes=table.notes,
    )


def _parse_interactions(path: Path, table: Table) -> Interactions:
    rows = None
    if ROW in table.columns:
        column = table.columns[ROW]
        if column.type != pa.int64() or column.null_count:
            raise DataError(
                f"{path}: column '{ROW}' is {column.type} with {column.null_count} nulls; it must hold row numbers "
                "as int64: remove it, or run `xsmoe prepare` again"
            )
        rows = column.to_numpy()
    return parse_interactions(
        path, table.columns, user="user", item="item", timestamp="timestamp", rows=rows, notes=table.notes
    )


def _table(path: Path, columns: Mapping[str, np.ndarray]) -> pa.Table:
    arrays = {}
    for name, values in columns.items():
        kind = pa.int64() if name in ("timestamp", ROW) else pa.string()
        try:
            arrays[name] = pa.array(values, kind)
        except (pa.ArrowException, UnicodeError) as error:
            raise DataError(f"{path}: column '{name}' cannot be written as {kind}: {error}") from error
    return pa.table(arrays)


def _check(folder: Path, interactions: Interactions, items: Items) -> None:
    listed = set(items.ids)
    if len(listed) < len(items):
        ids, counts = np.unique(items.ids, return_counts=True)
        raise DataError(
            f"{folder / ITEMS}: item ids must be distinct, but {_some(ids[counts > 1])} occur more than once"
        )
    absolute = np.array([image is not None and PurePath(image).is_absolute() for image in items.images], dtype=bool)
    if absolute.any():
        raise DataError(
            f"{folder / ITEMS}: image paths must be relative to the folder, but {_some(items.images[absolute])} "
            "are absolute"
        )
    unknown = sorted(set(interactions.items) - listed)
    if unknown:
        raise DataError(
            f"{folder / INTERACTIONS}: {len(unknown)} items are not in {ITEMS}: {_some(unknown)}; list them there, "
            "with null text and image if they have none"
        )


def _some(names: list[str] | np.ndarray, limit: int = 5) -> str:
    shown = ", ".join(repr(str(name)) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
