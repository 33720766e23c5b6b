"""Encoding a dataset's items into a hidden-state store, so that an interrupted run goes on where it stopped."""

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
    """Items as `xsmoe.data` has them: (N,) object arrays of str, with None where an item lacks its text or image."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def texts(self) -> np.ndarray: ...
    @property
    def images(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Unreadable:
    """A value that could not be encoded: its item, the modality, and why."""

    item: str
    modality: str
    reason: str


@dataclass
class EncodeReport:
    """What became of the items.

    Attributes:
        encoded: how many were added to the store.
        already_present: how many were in it before.
        missing: per modality, how many of the encoded items lack it, an unreadable value included.
        dropped: ids of items of which no modality is left; they are not stored.
        unreadable: values that could not be read.
        outdated: per modality, how many items the store holds without a value that they have now.
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
    """Encodes items that a store does not hold yet, and appends them to it.

    Items are committed in chunks. After an interruption at any moment the same call goes on with the first chunk that
    was not committed, and the store ends with the same bytes. An item once stored is not looked at again.

    Args:
        items: what to encode; a text of nothing but white space counts as absent.
        image_root: the folder that image paths are relative to.
        store_folder: a store, or where to make one.
        encoders: the encoder of each modality, under the modality's name. Text encoders take the items' texts, image
            encoders their images.
        batch_size: values that go through an encoder at once.
        dtype: what the store holds: torch.float16, torch.bfloat16 or torch.float32.
        chunk_items: items that are committed at once.
        on_error: "skip" takes an image that cannot be read as absent and lists it in the report, since one bad file
            should not end a run of hours; "raise" ends it.
        progress: called with the number of values (texts and images) encoded so far and in all. The numbers count this
            call's work only.

    Returns:
        What became of the items.

    Raises:
        ValueError: no encoder, ids that repeat, an image that cannot be read (with "raise"), images of which not one
            exists under image_root, or no item that has anything to encode.
        StoreError: a damaged store, or one of other encoders, pooling, levels or dtype.
    """
    if not encoders:
        raise ValueError("encoders must name at least one modality and its encoder, but is empty")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
    if chunk_items < 1:
        raise ValueError(f"chunk_items must be at least 1, not {chunk_items}")
    ids, folder = list(items.ids), Path(store_folder)
    if len(set(ids)) < len(ids):
        raise ValueError("items.ids must be distinct, but some id stands there twice")
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
    # Chunks are places in the list given, whatever is known of it: so a run that goes on forms the batches that an
    # undisturbed one forms, and rounds as it does.
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
            f"values could not be read{reason}. Give items with texts or images, or encoders for what they have"
        )
    return report


class _Progress:
    """Adds up what encoders report."""

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
    """Hidden states (N, levels, D) of N values, zeros for None; which were encoded, (N,) bool; reasons by place."""
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
    """What the encoder takes of each item: its text, or the path of its image."""
    if encoder.kind == "text":
        return [text if text is not None and text.strip() else None for text in items.texts]
    return [str(image_root / path) if path is not None else None for path in items.images]


def _check_some_exist(paths: Sequence[str | None], image_root: Path) -> None:
    """One missing file is an accident, all of them a wrong folder, which must not pass for items without images."""
    given = [path for path in paths if path is not None]
    if given and not any(Path(path).is_file() for path in given):
        raise ValueError(
            f"not one of the {len(given)} images exists, the first would be {given[0]}; give as image_root the folder "
            f"that the items' image paths are relative to, not {image_root}"
        )
