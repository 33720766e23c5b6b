"""The streams that variants are compared on: generated for each seed, or a dataset with its hidden-state store.

The parameters of generated streams were fixed before anything was tuned on them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xsmoe.atomic_files import replace_file
from xsmoe.cli.commands.demo import IMAGE_SIZE, TRAINING, DemoSettings
from xsmoe.cli.commands.encode import EncodeSettings, encode
from xsmoe.cli.display import Display
from xsmoe.data import Dataset, write_catalogue
from xsmoe.encoders import build_small_image_encoder, build_small_text_encoder

MARKER = "made.json"


@dataclass(frozen=True)
class GeneratedStream:
    """Parameters of a generated catalogue (`xsmoe.data.write_catalogue`). Each seed has its own data and encoders.

    Attributes:
        windows: number of windows.
        users: users of a window; with regimes, users of each regime.
        items, new_items: items at the start, and new items of each later window.
        returning: number of regimes that alternate; 0 for a drift without return.
        epochs: maximum epochs of a window.
    """

    windows: int
    users: int
    items: int
    new_items: int
    returning: int
    epochs: int


_DEMO = DemoSettings()

CATALOGUE = GeneratedStream(_DEMO.windows, _DEMO.users, _DEMO.items, new_items=80, returning=0, epochs=_DEMO.epochs)
"""The stream of `xsmoe demo`."""

RETURNING = GeneratedStream(windows=12, users=400, items=500, new_items=40, returning=4, epochs=_DEMO.epochs)
"""Four regimes. Each is active in three windows, and absent for three windows between two active ones."""

STREAMS = {"catalogue": CATALOGUE, "returning": RETURNING}


@dataclass(frozen=True)
class Source:
    """The data of a stream for one seed.

    Attributes:
        dataset, store: folders.
        settings: settings of all variants, by the names that `RunConfig.new` accepts: windows, sizes and epochs.
    """

    dataset: Path
    store: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


def generate(name: str, stream: GeneratedStream, seed: int, folder: Path) -> Source:
    """Create a catalogue and its store in a folder, unless they exist.

    Args:
        name: of the stream.
        stream: its parameters.
        seed: of the catalogue and the encoders.
        folder: of all generated data.

    Raises:
        ValueError: the folder holds data of other parameters.
    """
    place = folder / f"{name}-{seed}"
    marker = place / MARKER
    settings = {**TRAINING, "windows": stream.windows, "epochs": stream.epochs}
    source = Source(place / "catalogue", place / "store", settings)
    parameters = {key: value for key, value in asdict(stream).items() if key != "epochs"} | {"seed": seed}
    if marker.is_file():
        if (found := json.loads(marker.read_text())) != parameters:
            raise ValueError(f"{place} holds data of other parameters, {found}; give another --folder, or remove it")
        return source
    place.mkdir(parents=True, exist_ok=True)
    write_catalogue(
        source.dataset,
        seed=seed,
        num_windows=stream.windows,
        users=stream.users,
        items=stream.items,
        new_items=stream.new_items,
        returning=stream.returning,
        image_size=IMAGE_SIZE,
    )
    texts = [value for value in Dataset.load(source.dataset).items.texts if value]
    text, image = place / "encoders" / "text", place / "encoders" / "image"
    if not text.is_dir():
        build_small_text_encoder(text, texts, seed=seed)
    if not image.is_dir():
        build_small_image_encoder(image, image_size=IMAGE_SIZE, seed=seed)
    encode(source.dataset, source.store, EncodeSettings(text=str(text), image=str(image)), Display())
    # The marker is written last, so that an interrupted generation is repeated.
    replace_file(marker, (json.dumps(parameters) + "\n").encode())
    return source
