"""The stream that both formulations are trained on: the drifting catalogue's log, with hidden states made from items.

No encoder runs. An item's attributes, the visual ones for "image" and the others for "text", are rows of zeros and
ones; a fixed random map for each modality and level, and noise of the item's own, turn them into hidden states.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.steps.model import LEVELS
from bench.stream.settings import Settings
from xsmoe.data import Window, make_windows
from xsmoe.data.catalogue.attributes import ATTRIBUTES
from xsmoe.data.catalogue.generator import generate
from xsmoe.encoders import InMemoryFeatures

SPREAD = 0.2
"""Standard deviation of hidden states: the first scores then lie near 0, and training begins at once."""
NOISE = 0.3
"""What an item has for itself, where its attributes make 1."""
_SEEN = len(ATTRIBUTES) // 2
_MODALITIES = {"image": slice(0, _SEEN), "text": slice(_SEEN, None)}


@dataclass(frozen=True)
class Drawn:
    """A stream, and its hidden states twice.

    Attributes:
        windows: in time order.
        features: what our trainer asks.
        table: for each modality (items + 1, levels, D), as the published code takes it; row 0 is padding, item i is row
            i + 1. It shares its memory with `features`.
    """

    windows: list[Window]
    features: InMemoryFeatures
    table: dict[str, Tensor]


def draw(settings: Settings) -> Drawn:
    """The stream of a seed."""
    found = generate(
        seed=settings.seed,
        num_windows=settings.windows,
        users=settings.users,
        items=settings.items,
        new_items=settings.new_items,
    )
    windows = make_windows(found.users, found.items, found.timestamps, settings.windows, string_sort=True)
    table = _hidden(found.attributes, settings)
    levels = {name: list(rows[1:].unbind(1)) for name, rows in table.items()}
    if settings.pooling == "cls":
        levels = {name: [rows[0][:1], *rows[1:]] for name, rows in levels.items()}
    return Drawn(windows, InMemoryFeatures(levels), table)


def _hidden(attributes: np.ndarray, settings: Settings) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    coded = [
        torch.nn.functional.one_hot(torch.from_numpy(attributes[:, place]), len(attribute.values)).float()
        for place, attribute in enumerate(ATTRIBUTES)
    ]
    table = {}
    for modality, places in _MODALITIES.items():
        own = torch.cat(coded[places], dim=1)
        rows = torch.zeros(len(attributes) + 1, LEVELS + 1, settings.dim)
        for level in range(LEVELS + 1):
            projection = torch.randn(own.shape[1], settings.dim, generator=generator) / len(coded[places]) ** 0.5
            noise = torch.randn(len(attributes), settings.dim, generator=generator)
            rows[1:, level] = SPREAD * (own @ projection + NOISE * noise)
        if settings.pooling == "cls":
            rows[1:, 0] = rows[1, 0]
        table[modality] = rows.bfloat16() if settings.half else rows
    return table
