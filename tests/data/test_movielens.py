"""Tests of the MovieLens reader on a handwritten log and on the real one."""

from pathlib import Path

import pytest

from tests.movielens import movielens_folder
from xsmoe.data import DataError, Dataset, prepare_movielens

MOVIES = """movieId,title,genres
1,Toy Story (1995),Adventure|Animation|Children
58,"Postman, The (Postino, Il) (1994)",Comedy|Drama|Romance
7789,"11'09""01 - September 11 (2002)",Drama
9999,Untitled (2020),(no genres listed)
"""
RATINGS = """userId,movieId,rating,timestamp
2,58,4.5,964982703
2,1,0.5,964982703
1,7789,4.0,964981247
"""


def source(folder: Path, *, movies: str = MOVIES, ratings: str = RATINGS) -> Path:
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    (folder / "ratings.csv").write_text(ratings, encoding="utf-8")
    return folder


def test_small_log(tmp_path: Path) -> None:
    prepare_movielens(source(tmp_path), tmp_path / "out")
    dataset = Dataset.load(tmp_path / "out")
    assert dataset.items.ids.tolist() == ["1", "58", "7789", "9999"]
    assert dataset.items.texts.tolist() == [
        "Toy Story (1995): Adventure, Animation, Children",
        "Postman, The (Postino, Il) (1994): Comedy, Drama, Romance",
        "11'09\"01 - September 11 (2002): Drama",
        "Untitled (2020)",
    ]
    assert dataset.items.images.tolist() == [None] * 4
    assert dataset.interactions.users.tolist() == ["1", "2", "2"]
    assert dataset.interactions.items.tolist() == ["7789", "58", "1"]
    assert dataset.interactions.timestamps.tolist() == [964981247, 964982703, 964982703]


@pytest.mark.parametrize("missing", ["movies.csv", "ratings.csv"])
def test_missing_file_names_the_download_page(tmp_path: Path, missing: str) -> None:
    (source(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=rf"{missing}: there is no such file; .*grouplens\.org"):
        prepare_movielens(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'genres'.*MovieLens movies\.csv"):
        prepare_movielens(source(tmp_path, movies="movieId,title\n1,Toy Story\n"), tmp_path / "out")
    with pytest.raises(DataError, match="'2000-07-30' in data row 1"):
        prepare_movielens(source(tmp_path, ratings="userId,movieId,timestamp\n1,1,2000-07-30\n"), tmp_path / "out")


def test_real_log(tmp_path: Path) -> None:
    dataset = prepare_movielens(movielens_folder(), tmp_path)
    assert (len(dataset.interactions), len(dataset.items)) == (100_836, 9_742)
    assert len(set(dataset.interactions.users)) == 610
    # March 29, 1996 and September 24, 2018: the dates in the release's README.
    assert dataset.interactions.timestamps[[0, -1]].tolist() == [828_124_615, 1_537_799_250]
    texts = dict(zip(dataset.items.ids, dataset.items.texts, strict=True))
    assert texts["58"] == "Postman, The (Postino, Il) (1994): Comedy, Drama, Romance"
    assert texts["7789"] == "11'09\"01 - September 11 (2002): Drama"
    assert None not in texts.values()
