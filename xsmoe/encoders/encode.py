"""Encoding of a dataset's items into a hidden-state store. An interrupted run can be resumed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from xsmoe.encoders.encoder import FrozenEncoder
from xsmoe.encoders.manifest import MANIFEST
from xsmoe.encoders.store import HiddenStateStore


class ItemsLike(Protocol):
    """Items in the form of `xsmoe.data`: (N,) object arrays of str, with None for a missing text or image."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def texts(self) -> np.ndarray: ...
    @property
    def images(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Unreadable:
    """A value that could not be encoded: its item, its modality and the reason."""

    item: str
    modality: str
    reason: str


@dataclass
class EncodeReport:
    """The result of `encode_items`.

    Attributes:
        encoded: number of items added to the store.
        already_present: number of items that were already in the store.
        missing: per modality, number of encoded items without it, including unreadable values.
        dropped: ids of items that have no readable modality; they are not stored.
        unreadable: values that could not be read.
        outdated: per modality, number of items that have a value now but are stored without it.
    """

    encoded: int = 0
    already_present: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    outdated: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        missing = "".join(f", {count} without {name}" for name, count in self.missing.items() if count)
        return (
            f"{self.encoded} items encoded{missing}; {self.already_present} were there already; {len(self.dropped)} "
            f"dropped with nothing to encode; {len(self.unreadable)} values could not be read"
        )


def encode_items(
    items: ItemsLike,
    image_root: str | PathLike[str],
    store_folder: str | PathLike[str],
    encoders: Mapping[str, FrozenEncoder],
    *,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float16,
    chunk_items: int = 512,
    on_error: Literal["raise", "skip"] = "skip",
    progress: Callable[[int, int], None] | None = None,
) -> EncodeReport:
    """Encode the items that a store does not contain yet, and append them to it.

    Items are committed in chunks. After an interruption at any moment, the same call continues with the first
    uncommitted chunk, and the final bytes of the store are the same. Stored items are not encoded again.

    Args:
        items: the items to encode. A text of only white space counts as absent.
        image_root: the folder that image paths are relative to.
        store_folder: the folder of an existing or a new store.
        encoders: the encoder of each modality, by the modality's name. Text encoders encode the items' texts, image
            encoders their images.
        batch_size: number of values that an encoder processes at once.
        dtype: the store's dtype: torch.float16, torch.bfloat16 or torch.float32.
        chunk_items: number of items that are committed at once.
        on_error: "skip" treats an unreadable image as absent and lists it in the report, because one bad file should
            not end a run of several hours. "raise" raises ValueError.
        progress: called with the number of values (texts and images) encoded so far and the total. Both count only the
            work of this call.

    Returns:
        A report on the items.

    Raises:
        ValueError: there is no encoder, ids repeat, an image cannot be read (with "raise"), none of the images exists
            under image_root, or no item has a value to encode.
        StoreError: the store is damaged, or has other encoders, pooling, levels or another dtype.
    """
    if not encoders:
        raise ValueError("encoders must name at least one modality and its encoder, but is empty")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
    if chunk_items < 1:
        raise ValueError(f"chunk_items must be at least 1, not {chunk_items}")
    ids, folder = list(items.ids), Path(store_folder)
    if len(set(ids)) < len(ids):
        raise ValueError("items.ids must be distinct, but an id occurs more than once")
    specs = {name: encoder.spec(dtype) for name, encoder in encoders.items()}
    store = HiddenStateStore.open(folder) if (folder / MANIFEST).exists() else None
    if store is not None:
        store.check_specs(specs)
    values = {name: _values(items, encoder, Path(image_root)) for name, encoder in encoders.items()}
    given = {name: np.array([value is not None for value in column], bool) for name, column in values.items()}
    some = np.logical_or.reduce(list(given.values()))
    known = np.zeros(len(ids), dtype=bool) if store is None else store.index_of(ids) >= 0
    wanted = some & ~known
    report = EncodeReport(already_present=int(known.sum()), missing=dict.fromkeys(encoders, 0))
    report.dropped = [ids[place] for place in np.flatnonzero(~some & ~known)]
    if store is not None and known.any():
        rows = store.index_of([ids[place] for place in np.flatnonzero(known)])
        outdated = {name: int((given[name][known] & ~store.present(name)[rows]).sum()) for name in encoders}
        report.outdated = {name: count for name, count in outdated.items() if count}
    for name, encoder in encoders.items():
        if encoder.kind == "image" and (store is None or not store.present(name).any()):
            _check_some_exist([values[name][place] for place in np.flatnonzero(wanted)], Path(image_root))
    work = _Progress(progress, sum(int((has & wanted).sum()) for has in given.values()))
    # Chunks are ranges of the given list, including items that are stored already. So a resumed run forms the same
    # batches as an uninterrupted one, and rounds equally.
    for first in range(0, len(ids), chunk_items):
        places = first + np.flatnonzero(wanted[first : first + chunk_items])
        hidden, present = {}, {}
        for name, encoder in encoders.items():
            column = [values[name][place] for place in places]
            hidden[name], present[name], failures = _encode_column(encoder, column, batch_size, on_error, work)
            report.unreadable += [Unreadable(ids[places[at]], name, reason) for at, reason in failures.items()]
        kept = np.logical_or.reduce(list(present.values()))
        report.dropped += [ids[place] for place in places[~kept]]
        if not kept.any():
            continue
        if store is None:
            store = HiddenStateStore.create(folder, specs)
        store.append(
            [ids[place] for place in places[kept]],
            {name: rows[torch.from_numpy(kept)] for name, rows in hidden.items()},
            {name: has[kept] for name, has in present.items()},
        )
        report.encoded += int(kept.sum())
        for name, has in present.items():
            report.missing[name] += int((kept & ~has).sum())
    if report.encoded + report.already_present == 0:
        reason = f"; the first: {report.unreadable[0].reason}" if report.unreadable else ""
        raise ValueError(
            f"none of the {len(ids)} items has anything to encode for {', '.join(encoders)}: {len(report.unreadable)} "
            f"values could not be read{reason}. Give items with texts or images, or encoders for their modalities"
        )
    return report


class _Progress:
    """A counter that sums up the progress of the encoders."""

    def __init__(self, callback: Callable[[int, int], None] | None, total: int) -> None:
        self._callback = callback
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        if self._callback is not None:
            self._callback(self._done, self._total)


def _encode_column(
    encoder: FrozenEncoder, column: Sequence[str | None], batch_size: int, on_error: str, work: _Progress
) -> tuple[Tensor, np.ndarray, dict[int, str]]:
    """Encode N values, or None for absent ones.

    Returns:
        Hidden states (N, levels, D), zeros for values that were not encoded; which values were encoded, (N,) bool; and
        for each unreadable value its index and the reason.
    """
    has = np.array([value is not None for value in column], dtype=bool)
    chosen = np.flatnonzero(has)
    failures: dict[int, str] = {}
    rows = encoder.encode(
        [column[place] for place in chosen.tolist()],
        batch_size=batch_size,
        failures=failures if on_error == "skip" else None,
        progress=work.add,
    )
    hidden = rows.new_zeros(len(column), *rows.shape[1:])
    hidden[torch.from_numpy(chosen)] = rows
    has[chosen[list(failures)]] = False
    return hidden, has, {int(chosen[place]): reason for place, reason in failures.items()}


def _values(items: ItemsLike, encoder: FrozenEncoder, image_root: Path) -> list[str | None]:
    """Return each item's input for the encoder: its text, or the path of its image."""
    if encoder.kind == "text":
        return [text if text is not None and text.strip() else None for text in items.texts]
    return [str(image_root / path) if path is not None else None for path in items.images]


def _check_some_exist(paths: Sequence[str | None], image_root: Path) -> None:
    """Raise ValueError if no image exists. Then the folder is wrong; the items must not be stored without images."""
    given = [path for path in paths if path is not None]
    if given and not any(Path(path).is_file() for path in given):
        raise ValueError(
            f"not one of the {len(given)} images exists, for example {given[0]}; image_root must be the folder that "
            f"the items' image paths are relative to, not {image_root}"
        )
