"""Fixtures: a small dataset, its encoders, its store and a trained run, created once by the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.helpers import (
    NUM_INTERACTIONS,
    NUM_ITEMS,
    NUM_USERS,
    WORDS,
    Place,
    succeed,
    train_arguments,
    write_items,
    write_log,
)
from xsmoe.encoders import build_small_image_encoder, build_small_text_encoder
from xsmoe.report import plots


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Create a dataset from tables and a store, but no run."""
    place = Place(tmp_path_factory.mktemp("cli"))
    raw = place.root / "raw"
    raw.mkdir()
    rng = np.random.default_rng(0)
    write_items(raw / "items.parquet", range(NUM_ITEMS), rng)
    write_items(place.more_items, range(NUM_ITEMS, NUM_ITEMS + 2), rng)
    users = np.array([f"u{number}" for number in rng.integers(0, NUM_USERS, NUM_INTERACTIONS)])
    items = np.array([f"i{number}" for number in rng.integers(0, NUM_ITEMS, NUM_INTERACTIONS)])
    write_log(raw / "log.csv", users, items, start=1_600_000_000)
    later = np.array(["newcomer", "u1", "u2", "u3", "u4"] * 30)
    write_log(place.more, later, np.array([f"i{n}" for n in rng.integers(30, NUM_ITEMS + 2, 150)]), start=1_700_000_000)
    build_small_text_encoder(place.root / "encoders" / "text", WORDS, width=16, layers=2)
    build_small_image_encoder(place.root / "encoders" / "image", image_size=8, patch_size=4, width=8, layers=2)
    succeed("prepare", "table", place.dataset, "--interactions", raw / "log.csv", "--items", raw / "items.parquet")
    encoders = ["--text", place.root / "encoders" / "text", "--image", place.root / "encoders" / "image"]
    succeed("encode", place.dataset, place.store, *encoders)
    return place


@pytest.fixture(scope="session")
def trained(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Create a finished run in addition. Tests must not change it."""
    root = tmp_path_factory.mktemp("cli") / "all"
    shutil.copytree(prepared.root, root)
    succeed(*train_arguments(Place(root)))
    return Place(root)


@pytest.fixture
def one_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write reports with their first plot only. All plots would need more time than the training."""
    monkeypatch.setattr(plots, "PLOTS", plots.PLOTS[:1])


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Place], Place]:
    """Return a function that copies all files, so that a test can change them."""

    def copy(place: Place) -> Place:
        target = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(place.root, target)
        return Place(target)

    return copy
