"""Fixtures of the encoder tests: small encoders, images and items."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xsmoe.encoders import ImageEncoder, TextEncoder, build_small_image_encoder, build_small_text_encoder

COLOURS = ["red", "green", "blue", "white", "black"]
THINGS = ["wool shirt", "leather shoe", "paper lamp", "rain coat with a hood", "hat"]


@dataclass
class FakeItems:
    ids: np.ndarray
    texts: np.ndarray
    images: np.ndarray


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [f"{COLOURS[i % 5]} {THINGS[i // 5 % 5]} number {i}" for i in range(60)]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("text") / "tiny-bert"
    return build_small_text_encoder(folder, texts, width=32, layers=2)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image") / "tiny-vit"
    return build_small_image_encoder(folder, image_size=16, patch_size=8, width=32, layers=2)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 60 images of several sizes, 0.png to 59.png."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(60):
        pixels = rng.integers(0, 256, (12 + number % 3 * 10, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def text_encoder(text_folder: Path) -> TextEncoder:
    return TextEncoder(text_folder)


@pytest.fixture(scope="session")
def image_encoder(image_folder: Path) -> ImageEncoder:
    return ImageEncoder(image_folder)


@pytest.fixture(scope="session")
def make_items(texts: list[str]) -> Callable[[int], FakeItems]:
    """Return a function that makes items with both modalities."""

    def make(count: int) -> FakeItems:
        return FakeItems(
            ids=np.array([f"item {i}" for i in range(count)], dtype=object),
            texts=np.array(texts[:count], dtype=object),
            images=np.array([f"{i}.png" for i in range(count)], dtype=object),
        )

    return make


@pytest.fixture(scope="session")
def folder_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Read all files of a folder."""
    return lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
