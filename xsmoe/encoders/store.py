"""The hidden-state store: a folder of items' hidden states with appending and reading of single rows."""

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from xsmoe.encoders import features
from xsmoe.encoders.append import append_chunk, as_bits, integers, read_constant, write_lock
from xsmoe.encoders.manifest import (
    INDEX,
    MANIFEST,
    Manifest,
    MissingFileError,
    ModalitySpec,
    Part,
    StoreError,
    check_specs,
)

READ_BYTES = 1 << 24


class HiddenStateStore:
    """Hidden states of items on disk, with the `ItemFeatures` interface. Call `create` or `open` to get a store.

    The folder contains `manifest.json` and `items.jsonl`, the item ids. Each modality has these files:

    - `NAME.bin`: the memory-mapped array (items, levels, D) in little-endian float16, bfloat16 or float32, without the
      levels whose row is bitwise equal for every item;
    - `NAME.constant.bin`: the rows of these constant levels, stored once;
    - `NAME.present.bin`: one byte per item.

    If an item lacks a modality, its rows are zeros. A level that stops being constant is converted.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._ids = _read_index(folder, manifest)
        self._present = {name: _read_present(folder, manifest, part) for name, part in manifest.parts.items()}
        self._rows: dict[str, int] | None = None
        self._map()

    @classmethod
    def create(cls, folder: str | PathLike[str], modalities: Mapping[str, ModalitySpec]) -> "HiddenStateStore":
        """Create an empty store.

        Args:
            folder: the folder, which is created if it is missing. It must be empty.
            modalities: the kind of each modality's hidden states. All must have the same number of levels.

        Raises:
            StoreError: the folder is not empty, or another process is writing to it.
            ValueError: the modalities cannot share a store.
        """
        folder = Path(folder)
        manifest = Manifest.new(modalities)
        folder.mkdir(parents=True, exist_ok=True)
        with write_lock(folder):
            if (folder / MANIFEST).exists():
                raise StoreError(f"{folder} already holds a hidden-state store; open it, or give another folder")
            strangers = sorted(path.name for path in folder.iterdir() if not path.name.startswith(MANIFEST))
            if strangers:
                raise StoreError(
                    f"{folder} must be empty to hold a new store, but holds {strangers[0]}; give another folder"
                )
            manifest.write(folder)
            return cls(folder, manifest)

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> "HiddenStateStore":
        """Open a store at its last commit. Bytes of an interrupted append are ignored.

        This checks the presence and the sizes of all files, and the checksums of the item ids and of the presence
        files. Call `verify` to check the hidden states too; it takes as long as reading them.

        Raises:
            StoreError: there is no store, it is truncated or inconsistent, or it has another format version.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        while True:
            try:
                return cls(folder, manifest)
            except MissingFileError:
                # A writer that converts a level replaces the manifest, then removes the old files. Then try again.
                current = Manifest.read(folder)
                if current == manifest:
                    raise
                manifest = current

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self._folder

    @property
    def specs(self) -> dict[str, ModalitySpec]:
        """The kind of each modality's hidden states."""
        return {name: part.spec for name, part in self._manifest.parts.items()}

    @property
    def item_ids(self) -> np.ndarray:
        """(num_items,) object array of str: the item of each row."""
        return self._ids

    @property
    def num_items(self) -> int:
        return len(self._ids)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self._manifest.parts)

    @property
    def dims(self) -> dict[str, int]:
        return {name: part.spec.dim for name, part in self._manifest.parts.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: part.spec.dtype for name, part in self._manifest.parts.items()}

    @property
    def num_levels(self) -> int:
        return len(next(iter(self._manifest.parts.values())).spec.levels)

    def index_of(self, ids: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return the rows of items: (N,) int64, -1 for an id that is not in the store.

        Raises:
            TypeError: an id is not a string.
        """
        _check_strings(ids)
        if self._rows is None:
            self._rows = dict(zip(self._ids, range(self.num_items), strict=True))
        return np.fromiter(map(self._rows.get, ids, repeat(-1)), dtype=np.int64, count=len(ids))

    def present(self, modality: str) -> np.ndarray:
        features.select_modalities([modality], self.modalities)
        return self._present[modality]

    def hidden(
        self, items: np.ndarray | Tensor, modalities: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, list[Tensor]]:
        """Return the hidden states of some items, see `ItemFeatures.hidden`. Only their rows are read."""
        rows = features.row_indices(items, self.num_items)
        index = torch.from_numpy(rows)
        hidden = {}
        for name in features.select_modalities(modalities, self.modalities):
            part = self._manifest.parts[name]
            gathered = self._data[name].index_select(0, index).view(part.spec.dtype).to(dtype)
            at = dict(zip(part.varying, gathered.unbind(1), strict=True))
            if part.constant:
                once = torch.from_numpy(self._constant[name]).view(part.spec.dtype).to(dtype)
                has = self._present[name][rows]
                at |= {place: features.constant_rows(once[i : i + 1], has) for i, place in enumerate(part.constant)}
            hidden[name] = [at[place] for place in range(len(part.spec.levels))]
        return hidden

    def fingerprint(self, num_items: int | None = None) -> str:
        kinds = {name: part.spec.compatibility_key() for name, part in self._manifest.parts.items()}
        digest = hashlib.sha256(json.dumps(kinds, sort_keys=True).encode())
        if num_items is not None:
            features.check_known(num_items, self.num_items)
            digest.update(json.dumps(self._ids[:num_items].tolist()).encode())
        return digest.hexdigest()

    def check_specs(self, modalities: Mapping[str, ModalitySpec]) -> None:
        """Raise StoreError that names the differences unless these specs match the store's."""
        check_specs(self._folder, self.specs, modalities)

    def append(
        self,
        item_ids: Sequence[str] | np.ndarray,
        hidden: Mapping[str, np.ndarray | Tensor | Sequence[Tensor]],
        present: Mapping[str, np.ndarray] | None = None,
        *,
        allow_bare: bool = False,
    ) -> None:
        """Append items atomically: an interruption at any moment adds none of them.

        Args:
            item_ids: N ids, none of them in the store.
            hidden: per modality (N, levels, D), or a sequence of levels, each (N, D) or (1, D). If a modality is left
                out, all N items lack it.
            present: per modality (N,) bool, False for items without it; default all True.
            allow_bare: whether an item may lack every modality.

        Raises:
            TypeError: an id is not a string.
            ValueError: a shape is wrong, a value is not finite or too large for the dtype, an item has no modality, or
                a modality is unknown.
            StoreError: an id occurs twice or is already in the store, or another process has appended or is appending.
        """
        self._check_new(item_ids)
        ids = np.empty(len(item_ids), dtype=object)
        ids[:] = [str(item) for item in item_ids]
        rows, masks = self._checked(len(ids), hidden, present or {}, allow_bare)
        if not len(ids):
            return
        with write_lock(self._folder):
            if Manifest.read(self._folder) != self._manifest:
                raise StoreError(f"store {self._folder} was appended to by another process; open it again")
            self._manifest = append_chunk(self._folder, self._manifest, ids.tolist(), rows, masks, self._present)
            # Map the files under the lock: afterwards another process can convert a level and remove them.
            self._map()
        if self._rows is not None:
            self._rows.update(zip(ids, range(self.num_items, self.num_items + len(ids)), strict=True))
        self._ids = np.concatenate([self._ids, ids])
        self._present = {name: np.concatenate([mask, masks[name]]) for name, mask in self._present.items()}

    def verify(self) -> None:
        """Read all files and compare them with the checksums of the manifest.

        Raises:
            StoreError: a checksum differs. The message has the file, the range of bytes and both checksums of the first
                difference. Or another process has replaced files since this store was opened; then open it again.
        """
        try:
            self._compare()
        except MissingFileError as error:
            if Manifest.read(self._folder) == self._manifest:
                raise
            raise StoreError(
                f"store {self._folder} was converted by another process since it was opened; open it again"
            ) from error

    def _compare(self) -> None:
        _read_index(self._folder, self._manifest)
        for part in self._manifest.parts.values():
            _read_present(self._folder, self._manifest, part)
            if part.has_constant:
                read_constant(self._folder, part)
            if self._manifest.items == 0:
                continue
            path = self._folder / part.data_file
            start = 0
            with _open(path, self._manifest.items * part.row_bytes) as file:
                for chunk in self._manifest.chunks:
                    length = chunk.items * part.row_bytes
                    checksum = 0
                    for first in range(0, length, READ_BYTES):
                        checksum = zlib.crc32(file.read(min(READ_BYTES, length - first)), checksum)
                    _check_crc(path, start, length, chunk.crc32[part.data_file], checksum)
                    start += length

    def _check_new(self, ids: Sequence[str] | np.ndarray) -> None:
        known = self.index_of(ids)
        if (known >= 0).any():
            place = int(np.flatnonzero(known >= 0)[0])
            raise StoreError(f"item {ids[place]!r} is already in store {self._folder}; leave it out")
        seen: set[str] = set()
        for item in ids:
            if item in seen:
                raise StoreError(f"item {item!r} occurs twice in item_ids; give each item once")
            seen.add(item)

    def _checked(
        self,
        count: int,
        hidden: Mapping[str, np.ndarray | Tensor | Sequence[Tensor]],
        present: Mapping[str, np.ndarray],
        allow_bare: bool,
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        features.select_modalities([*hidden, *present], self.modalities)
        rows, masks = {}, {}
        for name, spec in self.specs.items():
            mask = np.asarray(present.get(name, np.full(count, name in hidden)), dtype=bool)
            if mask.shape != (count,):
                raise ValueError(f"present[{name!r}] must have shape ({count},), not {mask.shape}")
            if name not in hidden and mask.any():
                raise ValueError(f"hidden lacks {name!r}, but present[{name!r}] says that some items have it")
            given = hidden.get(name, torch.zeros(()).expand(count, len(spec.levels), spec.dim))
            rows[name], masks[name] = as_bits(name, spec, given, mask), mask
        bare = ~np.logical_or.reduce(list(masks.values()))
        if bare.any() and not allow_bare:
            raise ValueError(f"the item in row {int(np.flatnonzero(bare)[0])} has no modality at all; leave it out")
        return rows, masks

    def _map(self) -> None:
        """Map the committed rows of the data files into memory."""
        self._data: dict[str, Tensor] = {}
        self._constant: dict[str, np.ndarray] = {}
        for name, part in self._manifest.parts.items():
            shape = (self._manifest.items, len(part.varying), part.spec.dim)
            if part.has_constant:
                self._constant[name] = read_constant(self._folder, part).copy()
            else:
                self._constant[name] = np.zeros((len(part.constant), part.spec.dim), dtype=integers(part.spec))
            if self._manifest.items == 0:
                self._data[name] = torch.from_numpy(np.zeros(shape, dtype=integers(part.spec)))
                continue
            with _open(self._folder / part.data_file, self._manifest.items * part.row_bytes) as file:
                mapped = np.memmap(file, integers(part.spec), mode="r", shape=shape).view(np.ndarray)
            with warnings.catch_warnings():
                # The mapping is read-only and nobody writes to it. A writable mapping would count as used memory.
                warnings.filterwarnings("ignore", message=".*not writable")
                self._data[name] = torch.from_numpy(mapped)


def _check_strings(ids: Sequence[str] | np.ndarray) -> None:
    for kind in set(map(type, ids)):
        if not issubclass(kind, str):
            raise TypeError(f"item ids must be strings, but one is of type {kind.__name__}; convert them with str()")


@contextmanager
def _open(path: Path, expected: int) -> Iterator[BinaryIO]:
    """Open a file for reading. Raise unless it has at least this many bytes."""
    advice = f"expected {expected}; restore it from a copy, or encode again"
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise MissingFileError(f"{path} is missing, {advice}") from None
    with file:
        found = os.fstat(file.fileno()).st_size
        if found < expected:
            raise StoreError(f"{path} has {found} bytes, {advice}")
        yield file


def _check_crc(path: Path, start: int, length: int, expected: int, found: int) -> None:
    if found != expected:
        raise StoreError(
            f"{path}, bytes {start} to {start + length}: the checksum is {found}, expected {expected}; "
            "restore the file from a copy, or encode again"
        )


def _committed(path: Path, lengths: Sequence[int], checksums: Sequence[int]) -> bytes:
    """Return the committed bytes of a small file after a check of their checksums."""
    if not sum(lengths):
        return b""
    with _open(path, sum(lengths)) as file:
        content = file.read(sum(lengths))
    start = 0
    for length, expected in zip(lengths, checksums, strict=True):
        _check_crc(path, start, length, expected, zlib.crc32(memoryview(content)[start : start + length]))
        start += length
    return content


def _read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    lengths = [chunk.index_bytes for chunk in manifest.chunks]
    content = _committed(folder / INDEX, lengths, [chunk.crc32[INDEX] for chunk in manifest.chunks])
    ids = json.loads(b"[" + b",".join(content.splitlines()) + b"]")
    if len(ids) != manifest.items:
        raise StoreError(
            f"{folder / INDEX} names {len(ids)} items, {MANIFEST} counts {manifest.items}; restore them from a copy"
        )
    array = np.empty(len(ids), dtype=object)
    array[:] = ids
    return array


def _read_present(folder: Path, manifest: Manifest, part: Part) -> np.ndarray:
    lengths = [chunk.items for chunk in manifest.chunks]
    checksums = [chunk.crc32[part.present_file] for chunk in manifest.chunks]
    mask = np.frombuffer(_committed(folder / part.present_file, lengths, checksums), dtype=np.uint8).astype(bool)
    if int(mask.sum()) != part.num_present:
        raise StoreError(
            f"{folder / part.present_file} says that {int(mask.sum())} items have the modality, {MANIFEST} counts "
            f"{part.num_present}; restore them from a copy, or encode again"
        )
    return mask
