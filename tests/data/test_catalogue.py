"""Tests of the drifting catalogue: it is reproducible and well-formed, and contents predict users' next items."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xsmoe.data import Dataset, History, Sequences, WindowSplits, make_windows, split_window, write_catalogue
from xsmoe.data.catalogue.attributes import ATTRIBUTES
from xsmoe.data.catalogue.drawing import draw
from xsmoe.data.catalogue.generator import Catalogue, generate
from xsmoe.data.catalogue.simulation import LEAST_TAKEN, MOST_TAKEN

SMALL = {"num_windows": 3, "users": 40, "items": 80, "new_items": 12}
NUM_VALUES = max(len(attribute.values) for attribute in ATTRIBUTES)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def windows_of(catalogue: Catalogue, num_windows: int) -> list[WindowSplits]:
    windows = make_windows(catalogue.users, catalogue.items, catalogue.timestamps, num_windows)
    return [split_window(window) for window in windows]


def test_a_seed_gives_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        write_catalogue(tmp_path / name, seed=seed, image_size=32, **SMALL)
    first, again, other = (digests(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_what_is_written(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_catalogue(tmp_path, image_size=32, progress=lambda done, total: calls.append((done, total)), **SMALL)
    dataset = Dataset.load(tmp_path)
    catalogue = generate(**SMALL)
    assert len(dataset.items) == 80 + 2 * 12
    assert calls == [(done, 104) for done in range(1, 105)]
    assert len(dataset.interactions) == len(catalogue.users)
    for places, text, image in zip(catalogue.attributes, dataset.items.texts, dataset.items.images, strict=True):
        values = {attribute.name: attribute.values[place] for attribute, place in zip(ATTRIBUTES, places, strict=True)}
        words = text.lower()
        assert all(values[name] in words for name in ("category", "material", "style"))
        assert not any(values[name] in words for name in ("colour", "texture", "shape"))
        with Image.open(tmp_path / image) as picture:
            assert (picture.size, picture.mode, picture.format) == ((32, 32), "RGB", "PNG")


def test_an_interrupted_catalogue_is_no_valid_dataset(tmp_path: Path) -> None:
    write_catalogue(tmp_path, image_size=16, **SMALL)

    def interrupt(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_catalogue(tmp_path, image_size=16, seed=1, progress=interrupt, **SMALL)
    with pytest.raises(ValueError, match=r"items\.parquet: there is no such file"):
        Dataset.load(tmp_path)


def test_windows_of_equal_count_are_those_of_the_drift() -> None:
    catalogue = generate(**SMALL)
    for number, window in enumerate(make_windows(catalogue.users, catalogue.items, catalogue.timestamps, 3)):
        _, counts = np.unique(window.users, return_counts=True)
        assert len(counts) == 40
        assert counts.min() >= LEAST_TAKEN
        assert counts.max() <= MOST_TAKEN
        assert (catalogue.arrival[window.items] <= number).all()
        assert (catalogue.retirement[window.items] > number).all()
    assert set(catalogue.arrival.tolist()) == {0, 1, 2}
    assert (catalogue.retirement < 3).sum() == 2 * 6
    assert len(np.unique(np.stack([catalogue.users, catalogue.items]), axis=1).T) == len(catalogue.users)


def test_users_come_and_go_and_new_values_appear() -> None:
    catalogue = generate(**SMALL)
    first, _, last = (
        set(window.users) for window in make_windows(catalogue.users, catalogue.items, catalogue.timestamps, 3)
    )
    assert first - last
    assert last - first
    at_start = catalogue.attributes[catalogue.arrival == 0].max(axis=0)
    later = catalogue.attributes[catalogue.arrival > 0].max(axis=0)
    grows = [attribute.released < len(attribute.values) for attribute in ATTRIBUTES]
    assert [attribute.name for attribute, more in zip(ATTRIBUTES, later > at_start, strict=True) if more] == [
        attribute.name for attribute, more in zip(ATTRIBUTES, grows, strict=True) if more
    ]


@pytest.mark.parametrize("new_items", [0, 1, 500])
def test_extreme_arrivals(new_items: int) -> None:
    catalogue = generate(num_windows=4, users=3, items=64, new_items=new_items)
    assert len(catalogue.attributes) == 64 + 3 * new_items
    assert len(np.unique(np.stack([catalogue.users, catalogue.items]), axis=1).T) == len(catalogue.users)


@pytest.mark.parametrize(
    "setting", [{"seed": -1}, {"num_windows": 1}, {"users": 0}, {"items": 47}, {"new_items": -1}, {"image_size": 8}]
)
def test_settings_out_of_range(tmp_path: Path, setting: dict[str, int]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} must be at least .* not {value}"):
        write_catalogue(tmp_path / "out", **(SMALL | setting))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["colour", "texture", "shape"])
def test_pictures_show_every_visual_value(name: str) -> None:
    """With equal random numbers, different values of the attribute yield different pictures."""
    visual = {attribute.name: attribute.values for attribute in ATTRIBUTES[:3]}
    fixed = {other: values[0] for other, values in visual.items()}
    pictures = {
        draw(**(fixed | {name: value}), size=32, rng=np.random.default_rng(0)).tobytes() for value in visual[name]
    }
    assert len(pictures) == len(visual[name])


def lifts(sequences: Sequences, attributes: np.ndarray) -> list[np.ndarray]:
    """Return, per attribute, log of P(next item's value | this item's value) / P(value), (values, values)."""
    inner = np.ones(len(sequences.items), bool)
    inner[sequences.offsets[1:] - 1] = False
    here, following = (attributes[sequences.items[places]] for places in (inner, np.roll(inner, 1)))
    tables = []
    for place in range(attributes.shape[1]):
        counts = np.full((NUM_VALUES, NUM_VALUES), 0.5)
        np.add.at(counts, (here[:, place], following[:, place]), 1)
        tables.append(np.log(counts / counts.sum(1, keepdims=True) / (counts.sum(0) / counts.sum())))
    return tables


def hit_rate(scores: np.ndarray, test: Sequences, candidates: np.ndarray, history: History) -> float:
    """Return HR@10 of scores (users, items) over the candidates that are new to the user in the test window."""
    targets = test.items[test.offsets[1:] - 1]
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    allowed = np.zeros(scores.shape, bool)
    allowed[:, candidates] = True
    values, offsets = history.of(test.users)
    allowed[np.repeat(np.arange(len(test)), np.diff(offsets)), values] = False
    allowed[np.arange(len(test)), targets] = False
    higher, equal = (allowed & (scores > own)).sum(1), (allowed & (scores == own)).sum(1)
    return float((1 + higher + (equal + 1) // 2 <= 10).mean())


def test_contents_predict_the_next_item_and_popularity_does_not() -> None:
    """Compare attributes of the last item with popularity: learn from one window, predict the next one."""
    catalogue = generate(seed=0)
    splits = windows_of(catalogue, 6)
    num_items = len(catalogue.attributes)
    history, rates = History(), []
    for past, future in itertools.pairwise(splits):
        history.add(*past.all_pairs)
        test = future.test
        known = np.union1d(history.pairs()[1], future.all_pairs[1])
        popularity = np.bincount(past.all_pairs[1], minlength=num_items)
        last = catalogue.attributes[test.items[test.offsets[1:] - 2]]
        tables = lifts(past.test, catalogue.attributes)
        scores = [np.tile(popularity, (len(test), 1))]
        for places in (range(3), range(3, 6), range(6)):
            scores.append(np.sum([tables[at][last[:, at]][:, catalogue.attributes[:, at]] for at in places], axis=0))
        rates.append([hit_rate(score, test, known, history) for score in scores])
    popular, seen, read, both = np.mean(rates, axis=0)
    assert both > 5 * popular
    assert min(seen, read) > 1.5 * popular
    assert both > 1.3 * max(seen, read)
