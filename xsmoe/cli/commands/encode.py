"""Command `xsmoe encode`: encode items into a hidden-state store, and record the encoders' locations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xsmoe.cli.display import Display
from xsmoe.cli.run_config import check_device, portable
from xsmoe.data import Dataset, Items
from xsmoe.encoders import (
    EncodeReport,
    FrozenEncoder,
    HiddenStateStore,
    ImageEncoder,
    TextEncoder,
    encode_items,
    resolve,
)
from xsmoe.encoders.encoder import Pooling
from xsmoe.encoders.manifest import DTYPES
from xsmoe.stream.state.checkpoints import write_atomically

SOURCES = "encoders.json"
SHOWN = 5


@dataclass(frozen=True)
class EncodeSettings:
    """Settings of the encoding.

    Attributes:
        text, image: encoder: a folder, a name on the Hugging Face hub, or "minilm"; None omits the modality.
        pooling: "cls" or "mean".
        levels: layers to store; None selects 0, L // 2 and L.
        dtype: name of the store's dtype.
        compute_dtype: name of the dtype of the computation.
        max_tokens: texts are truncated to this number of tokens.
        image_size: in pixels; None selects the encoder's size.
        batch_size: number of texts or images in an encoder batch.
        device: device of the encoders.
    """

    text: str | None = None
    image: str | None = None
    pooling: Pooling = "mean"
    levels: Sequence[int] | None = None
    dtype: str = "float16"
    compute_dtype: str = "float32"
    max_tokens: int = 40
    image_size: int | None = None
    batch_size: int = 64
    device: str = "cpu"


def encode(dataset_folder: Path, store_folder: Path, settings: EncodeSettings, display: Display) -> EncodeReport:
    """Encode the items of a dataset that are not in the store yet."""
    if settings.text is None and settings.image is None:
        raise ValueError("no encoder is given; use --text, --image, or both")
    for name in ("dtype", "compute_dtype"):
        if getattr(settings, name) not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, not {getattr(settings, name)!r}")
    check_device(settings.device)
    dataset = Dataset.load(dataset_folder)
    encoders: dict[str, FrozenEncoder] = {}
    compute_dtype = DTYPES[settings.compute_dtype]
    if settings.image is not None:
        encoders["image"] = ImageEncoder(
            settings.image,
            pooling=settings.pooling,
            levels=settings.levels,
            image_size=settings.image_size,
            device=settings.device,
            compute_dtype=compute_dtype,
        )
    if settings.text is not None:
        encoders["text"] = TextEncoder(
            settings.text,
            pooling=settings.pooling,
            levels=settings.levels,
            max_tokens=settings.max_tokens,
            device=settings.device,
            compute_dtype=compute_dtype,
        )
    report = _run(dataset.items, dataset.folder, store_folder, encoders, settings.dtype, settings.batch_size, display)
    sources = {"image": settings.image, "text": settings.text}
    save_sources(store_folder, {name: str(sources[name]) for name in encoders})
    return report


def encode_more(items: Items, root: Path, store: HiddenStateStore, given: Mapping[str, str], display: Display) -> None:
    """Encode new items with the encoders and settings of a store, and append them to the store.

    Args:
        items: the items. Items in the store are not encoded again.
        root: base folder of relative image paths.
        store: must be opened again afterwards.
        given: locations of encoders by modality. Others are expected at their recorded location.
        display: display of the command.

    Raises:
        StoreError: an encoder differs from the one that the store was created with.
        ValueError: the location of an encoder is unknown.
    """
    sources = read_sources(store.folder) | dict(given)
    encoders: dict[str, FrozenEncoder] = {}
    for name, spec in store.specs.items():
        if name not in ("text", "image") or name not in sources:
            raise ValueError(
                f"store {store.folder} has no location of the encoder {spec.encoder!r} of its modality {name!r}; "
                + (f"give it with --{name}" if name in ("text", "image") else "append the new items to it yourself")
            )
        options = dict(spec.options)
        compute_dtype = DTYPES[options["compute_dtype"]]
        if name == "text":
            encoders[name] = TextEncoder(
                sources[name],
                pooling=_pooling(spec.pooling),
                levels=spec.levels,
                max_tokens=options["max_tokens"],
                compute_dtype=compute_dtype,
            )
        else:
            encoders[name] = ImageEncoder(
                sources[name],
                pooling=_pooling(spec.pooling),
                levels=spec.levels,
                image_size=(options["image_size"][0], options["image_size"][1]),
                mean=options["mean"],
                std=options["std"],
                compute_dtype=compute_dtype,
            )
    dtype = str(next(iter(store.specs.values())).dtype).removeprefix("torch.")
    _run(items, root, store.folder, encoders, dtype, EncodeSettings.batch_size, display)
    save_sources(store.folder, sources)


def save_sources(folder: Path, sources: Mapping[str, str]) -> None:
    """Record the locations of a store's encoders in the store's folder."""
    places = {
        name: {"folder": portable(Path(source).resolve(), folder)} if _is_folder(source) else {"name": source}
        for name, source in sources.items()
    }
    write_atomically(folder / SOURCES, (json.dumps(places, indent=2) + "\n").encode())


def read_sources(folder: Path) -> dict[str, str]:
    """Return the recorded locations of a store's encoders; an empty dict if there are none."""
    path = folder / SOURCES
    if not path.is_file():
        return {}
    places = json.loads(path.read_text())
    return {
        name: str((folder.resolve() / place["folder"]).resolve()) if "folder" in place else place["name"]
        for name, place in places.items()
    }


def _run(
    items: Items,
    root: Path,
    store_folder: Path,
    encoders: Mapping[str, FrozenEncoder],
    dtype: str,
    batch_size: int,
    display: Display,
) -> EncodeReport:
    with display.progress("Encoding") as advance:
        report = encode_items(
            items, root, store_folder, encoders, batch_size=batch_size, dtype=DTYPES[dtype], progress=advance
        )
    display.say(f"{store_folder}: {report}")
    for name, count in report.outdated.items():
        display.warn(
            f"the store has {count} items without {name}, although the dataset has one for them: it could not be read "
            "when they were encoded, or is new; encode into a new folder to add it"
        )
    for value in report.unreadable[:SHOWN]:
        display.warn(f"item {value.item}: {value.reason}")
    if len(report.unreadable) > SHOWN:
        display.warn(f"and {len(report.unreadable) - SHOWN} more values that could not be read")
    return report


def _is_folder(source: str) -> bool:
    return Path(source).is_dir() and resolve(source) == source


def _pooling(name: str) -> Pooling:
    if name not in ("cls", "mean"):
        raise ValueError(
            f"the store's pooling is {name!r}, which no encoder of xsmoe supports (cls, mean); "
            "append the new items with HiddenStateStore.append"
        )
    return "cls" if name == "cls" else "mean"
