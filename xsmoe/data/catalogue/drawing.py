"""Images of synthetic items: one patterned shape on a light background."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from xsmoe.data.catalogue.attributes import COLOURS

_OVERSAMPLING = 2


def draw(colour: str, texture: str, shape: str, size: int, rng: np.random.Generator) -> Image.Image:
    """Return an RGB image of `size` x `size` pixels of an item with these attributes.

    Position, size, rotation, shade, background and the pattern's offset are random.
    """
    wide = size * _OVERSAMPLING
    base = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255)
    # The second tone contrasts with the first: it is darker than a light tone and lighter than a dark one.
    tone = base * 0.45 if base.mean() > 140 else base + (255 - base) * 0.7
    ground = rng.integers(225, 251, 3)
    x, y = np.meshgrid(np.arange(wide) / wide, np.arange(wide) / wide)
    shift_x, shift_y = rng.random(2)
    pattern = _TEXTURES[texture](x * 6 + shift_x, y * 6 + shift_y)
    inside = np.asarray(_mask(shape, wide, rng), dtype=bool)
    pixels = np.where(inside[..., None], np.where(pattern[..., None], tone, base), ground)
    return Image.fromarray(pixels.astype(np.uint8)).reduce(_OVERSAMPLING)


def _plain(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.zeros(x.shape, dtype=bool)


def _striped(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x + y) % 1 < 0.5


def _banded(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return y % 1 < 0.5


def _dotted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.33**2


def _checked(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.floor(x) + np.floor(y)) % 2 == 0


def _zigzag(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y + np.abs(x % 1 - 0.5)) % 1 < 0.45


_TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": _plain,
    "striped": _striped,
    "banded": _banded,
    "dotted": _dotted,
    "checked": _checked,
    "zigzag": _zigzag,
}

# For each shape: the distances of its corners from the centre, and the direction of the first corner in degrees.
_POLYGONS = {
    "square": ([1.0] * 4, 45),
    "triangle": ([1.0] * 3, -90),
    "diamond": ([1.0, 0.65] * 2, -90),
    "star": ([1.0, 0.45] * 5, -90),
}


def _mask(shape: str, size: int, rng: np.random.Generator) -> Image.Image:
    mask = Image.new("1", (size, size))
    pen = ImageDraw.Draw(mask)
    centre = size * (0.5 + rng.uniform(-0.04, 0.04, 2))
    radius = size * rng.uniform(0.38, 0.46)
    tilt = rng.uniform(-8, 8)
    if shape in _POLYGONS:
        distances, first = _POLYGONS[shape]
        angles = np.deg2rad(first + tilt + np.arange(len(distances)) * 360 / len(distances))
        points = centre + radius * np.array(distances)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        pen.polygon([tuple(point) for point in points.tolist()], fill=1)
    else:
        pen.ellipse([*(centre - radius), *(centre + radius)], fill=1)
        if shape == "ring":
            pen.ellipse([*(centre - radius / 2), *(centre + radius / 2)], fill=0)
    return mask
