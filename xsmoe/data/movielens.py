"""MovieLens logs (https://grouplens.org/datasets/movielens/) as datasets."""

from os import PathLike
from pathlib import Path

import numpy as np

from xsmoe.data.dataset import Dataset, Items, write_dataset
from xsmoe.data.errors import DataError
from xsmoe.data.interactions import read_interactions
from xsmoe.data.tables import id_strings, optional_strings, read_table

_UNLABELLED = "(no genres listed)"


def prepare_movielens(source_folder: str | PathLike[str], out_folder: str | PathLike[str]) -> Dataset:
    """Convert a MovieLens release in CSV form, such as ml-latest-small, to a dataset.

    Every rating becomes one interaction, whatever its number of stars. An item's text is its title and its genres, such
    as "Toy Story (1995): Adventure, Animation". There are no images.

    Args:
        source_folder: the folder of `movies.csv` (movieId, title, genres) and `ratings.csv` (userId, movieId,
            timestamp).
        out_folder: the folder of the new dataset.

    Raises:
        DataError: a file is missing or has another format.
    """
    source = Path(source_folder)
    movies, ratings = source / "movies.csv", source / "ratings.csv"
    for path in (movies, ratings):
        if not path.is_file():
            raise DataError(
                f"{path}: there is no such file; unpack a release from https://grouplens.org/datasets/movielens/, for "
                "instance ml-latest-small.zip, and give the folder that holds movies.csv and ratings.csv"
            )
    wanted = dict.fromkeys(("movieId", "title", "genres"), "Is this a MovieLens movies.csv?")
    table = read_table(movies, wanted, text=("title",))
    columns = table.columns
    titles = optional_strings(movies, "title", columns["title"])
    genres = optional_strings(movies, "genres", columns["genres"])
    items = Items(
        ids=id_strings(movies, "movieId", columns["movieId"]),
        texts=np.array([_text(title, labels) for title, labels in zip(titles, genres, strict=True)], dtype=object),
        images=np.full(len(titles), None, dtype=object),
        notes=table.notes,
    )
    return write_dataset(out_folder, read_interactions(ratings, user="userId", item="movieId"), items)


def _text(title: str | None, genres: str | None) -> str | None:
    labels = None if genres is None or genres == _UNLABELLED else genres.replace("|", ", ")
    return ": ".join(part for part in (title, labels) if part) or None
