"""The generated stream: the log of the drifting catalogue, and hidden states that are computed from item attributes.

No encoder runs. The one-hot attributes of an item, visual ones for "image" and the others for "text", are multiplied by
a fixed random matrix for each modality and level, and noise is added for each item.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.e2e.models import LEVELS
from bench.e2e.stream.settings import Settings
from xsmoe.data import Window, make_windows
from xsmoe.data.catalogue.attributes import ATTRIBUTES
from xsmoe.data.catalogue.generator import generate
from xsmoe.encoders import InMemoryFeatures

SPREAD = 0.2
"""Standard deviation of the hidden states. It keeps the first scores near 0, so that training starts without delay."""
NOISE = 0.3
"""Standard deviation of an item's noise, if that of its attributes is 1."""
_VISUAL = len(ATTRIBUTES) // 2
_MODALITIES = {"image": slice(0, _VISUAL), "text": slice(_VISUAL, None)}


@dataclass(frozen=True)
class StreamData:
    """A stream and its hidden states, in two layouts that share their memory.

    Attributes:
        windows: in time order.
        features: for our trainer.
        table: for the paper's formulation: (items + 1, levels, D) per modality. Row 0 is padding, and item i is row
            i + 1.
    """

    windows: list[Window]
    features: InMemoryFeatures
    table: dict[str, Tensor]


def generate_stream(settings: Settings) -> StreamData:
    """Return the stream of the seed."""
    found = generate(
        seed=settings.seed,
        num_windows=settings.windows,
        users=settings.users,
        items=settings.items,
        new_items=settings.new_items,
    )
    windows = make_windows(found.users, found.items, found.timestamps, settings.windows, string_sort=True)
    table = _hidden_states(found.attributes, settings)
    levels = {name: list(rows[1:].unbind(1)) for name, rows in table.items()}
    if settings.pooling == "cls":
        levels = {name: [rows[0][:1], *rows[1:]] for name, rows in levels.items()}
    return StreamData(windows, InMemoryFeatures(levels), table)


def _hidden_states(attributes: np.ndarray, settings: Settings) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    one_hot = [
        torch.nn.functional.one_hot(torch.from_numpy(attributes[:, place]), len(attribute.values)).float()
        for place, attribute in enumerate(ATTRIBUTES)
    ]
    table = {}
    for modality, places in _MODALITIES.items():
        own = torch.cat(one_hot[places], dim=1)
        rows = torch.zeros(len(attributes) + 1, LEVELS + 1, settings.dim)
        for level in range(LEVELS + 1):
            projection = torch.randn(own.shape[1], settings.dim, generator=generator) / len(one_hot[places]) ** 0.5
            noise = torch.randn(len(attributes), settings.dim, generator=generator)
            rows[1:, level] = SPREAD * (own @ projection + NOISE * noise)
        if settings.pooling == "cls":
            rows[1:, 0] = rows[1, 0]
        table[modality] = rows.bfloat16() if settings.half else rows
    return table
