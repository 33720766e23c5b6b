"""The data that variants are compared on: generated once for each seed, or a dataset and its store."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.quality.presets import Preset
from xsmoe.atomic_files import replace_file
from xsmoe.cli.commands.demo import IMAGE_SIZE, TRAINING
from xsmoe.cli.commands.encode import EncodeSettings, encode
from xsmoe.cli.display import Display
from xsmoe.data import Dataset, write_catalogue
from xsmoe.encoders import build_small_image_encoder, build_small_text_encoder

MARK = "made.json"


@dataclass(frozen=True)
class Source:
    """A stream's data for one seed.

    Attributes:
        dataset, store: folders.
        settings: what all variants set, by the names that `RunConfig.new` takes: windows, sizes and epochs.
        shared: whether all seeds have the same data, so that a user is the same one in all of them.
    """

    dataset: Path
    store: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False


def generated(name: str, preset: Preset, seed: int, folder: Path) -> Source:
    """Make a catalogue and its store in a folder, if they are not there yet.

    Args:
        name: of the stream.
        preset: its parameters.
        seed: of the catalogue and the encoders.
        folder: of all data.

    Raises:
        ValueError: the folder holds the data of other parameters.
    """
    place = folder / f"{name}-{seed}"
    mark, wanted = place / MARK, {**asdict(preset), "seed": seed}
    settings = {**TRAINING, "windows": preset.windows, "epochs": preset.epochs}
    source = Source(place / "catalogue", place / "store", settings)
    made = {key: value for key, value in wanted.items() if key != "epochs"}
    if mark.is_file():
        if (found := json.loads(mark.read_text())) != made:
            raise ValueError(f"{place} holds data of other parameters, {found}; give another --folder, or remove it")
        return source
    place.mkdir(parents=True, exist_ok=True)
    write_catalogue(
        source.dataset,
        seed=seed,
        num_windows=preset.windows,
        users=preset.users,
        items=preset.items,
        new_items=preset.new_items,
        returning=preset.returning,
        image_size=IMAGE_SIZE,
    )
    texts = [value for value in Dataset.load(source.dataset).items.texts if value]
    text, image = place / "encoders" / "text", place / "encoders" / "image"
    if not text.is_dir():
        build_small_text_encoder(text, texts, seed=seed)
    if not image.is_dir():
        build_small_image_encoder(image, image_size=IMAGE_SIZE, seed=seed)
    encode(source.dataset, source.store, EncodeSettings(text=str(text), image=str(image)), Display())
    replace_file(mark, (json.dumps(made) + "\n").encode())
    return source
