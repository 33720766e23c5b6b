"""Crash-safe appending to a hidden-state store. An interruption at any moment leaves the committed state unchanged.

Data is written after the committed rows and synced to disk. Only then a new manifest replaces the old one. If the
layout of a data file must change, the data is written to a new file with another name. The new manifest refers to it.
"""

import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xsmoe.atomic_files import sync_folder
from xsmoe.encoders.manifest import (
    INDEX,
    Chunk,
    Manifest,
    MissingFileError,
    ModalitySpec,
    Part,
    StoreError,
)

if sys.platform != "win32":
    import fcntl

BLOCK_ROWS = 4096


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Exclude other processes from appending. The operating system releases the lock when the process dies.

    Raises:
        StoreError: another process is appending.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"store {folder} is being written by another process; wait until it is done") from None
        yield
    finally:
        os.close(descriptor)


def integers(spec: ModalitySpec) -> np.dtype:
    """Return the integer type for the bits of a spec's dtype. NumPy itself lacks bfloat16."""
    return np.dtype(f"<i{spec.dtype.itemsize}")


def as_bits(
    name: str, spec: ModalitySpec, hidden: np.ndarray | Tensor | Sequence[Tensor], present: np.ndarray
) -> np.ndarray:
    """Return hidden states as stored bits, (N, levels, D) integers, with zeros for items that are not present.

    Args:
        hidden: (N, levels, D), or a sequence of levels, each (N, D) or (1, D).
        present: (N,) bool.

    Raises:
        ValueError: the shape is wrong, or a value is not finite or too large for the dtype.
    """
    if isinstance(hidden, np.ndarray):
        hidden = torch.from_numpy(np.ascontiguousarray(hidden))
    elif not isinstance(hidden, Tensor):
        hidden = torch.stack([level.expand(len(present), -1) for level in hidden], dim=1)
    want = (len(present), len(spec.levels), spec.dim)
    if tuple(hidden.shape) != want:
        raise ValueError(f"hidden[{name!r}] must have shape {want} (items, levels, D), not {tuple(hidden.shape)}")
    mask = torch.from_numpy(present)
    hidden = hidden.detach().cpu().masked_fill(~mask[:, None, None], 0)
    stored = hidden.to(spec.dtype)
    finite = stored.isfinite().flatten(1).all(1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        if hidden[row].isfinite().all():
            raise ValueError(
                f"hidden[{name!r}] holds {float(hidden[row].abs().max()):.6g} in row {row}, which {spec.dtype} cannot "
                "hold; use a store in bfloat16 or float32"
            )
        raise ValueError(f"hidden[{name!r}] is not finite in row {row}; the encoder's output is broken there")
    whole = torch.int16 if spec.dtype.itemsize == 2 else torch.int32
    return stored.contiguous().view(whole).numpy().astype(integers(spec), copy=False)


def append_chunk(
    folder: Path,
    manifest: Manifest,
    ids: Sequence[str],
    rows: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    committed_present: Mapping[str, np.ndarray],
) -> Manifest:
    """Append items after those of `manifest` and commit them. The caller must hold `write_lock`.

    Args:
        ids: N item ids.
        rows: for each modality, the result of `as_bits`.
        present: for each modality, (N,) bool.
        committed_present: for each modality, (committed items,) bool.

    Returns:
        The manifest that is now on disk. The argument `manifest` does not change.
    """
    grown = deepcopy(manifest)
    lines = "".join(json.dumps(item) + "\n" for item in ids).encode()
    chunk = Chunk(len(ids), len(lines), {INDEX: _write_after(folder / INDEX, manifest.index_bytes, lines)})
    for name, part in grown.parts.items():
        _fit_layout(folder, grown, part, rows[name][present[name]], committed_present[name])
        data = _raw(rows[name][:, list(part.varying)])
        chunk.crc32[part.data_file] = _write_after(folder / part.data_file, grown.items * part.row_bytes, data)
        mask = present[name].astype(np.uint8)
        chunk.crc32[part.present_file] = _write_after(folder / part.present_file, grown.items, _raw(mask))
        part.num_present += int(mask.sum())
    grown.chunks.append(chunk)
    sync_folder(folder)
    grown.write(folder)
    _remove_superseded(folder, grown)
    return grown


def read_constant(folder: Path, part: Part) -> np.ndarray:
    """Return the constant rows of a modality, (constant levels, D) integers, after a check of the file.

    Raises:
        StoreError: the file is missing or damaged.
    """
    path = folder / part.constant_file
    expected = len(part.constant) * part.spec.dim * part.spec.dtype.itemsize
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"{path} is missing; restore it from a copy, or encode again") from None
    if len(content) != expected or zlib.crc32(content) != part.constant_crc32:
        raise StoreError(
            f"{path} has {len(content)} bytes with checksum {zlib.crc32(content)}, expected {expected} bytes with "
            f"checksum {part.constant_crc32}; restore it from a copy, or encode again"
        )
    return np.frombuffer(content, dtype=integers(part.spec)).reshape(len(part.constant), part.spec.dim)


def _fit_layout(folder: Path, manifest: Manifest, part: Part, rows: np.ndarray, committed: np.ndarray) -> None:
    """Convert levels that the new rows show not to be constant: store them for every item instead of once."""
    if not part.constant or not len(rows):
        return
    before = part.constant
    known = read_constant(folder, part) if part.has_constant else rows[0, list(before)]
    same = (rows[:, list(before)] == known).all(axis=(0, 2))
    constant = tuple(place for place, still in zip(before, same, strict=True) if still)
    if part.has_constant and constant == before:
        return
    if constant != before and manifest.items > 0:
        old = deepcopy(part)
        part.constant, part.generation = constant, part.generation + 1
        _rewrite(folder, manifest, old, part, known, committed)
    part.constant = constant
    part.constant_crc32 = None
    if constant:
        part.constant_crc32 = _write_after(folder / part.constant_file, 0, _raw(known[same]))


def _rewrite(folder: Path, manifest: Manifest, old: Part, new: Part, known: np.ndarray, committed: np.ndarray) -> None:
    """Write the committed rows in the layout of `new`. Levels that are no longer constant get their `known` rows."""
    source = np.memmap(
        folder / old.data_file,
        dtype=integers(old.spec),
        mode="r",
        shape=(manifest.items, len(old.varying), old.spec.dim),
    )
    start = 0
    with (folder / new.data_file).open("wb") as file:
        for chunk in manifest.chunks:
            checksum = 0
            for first in range(start, start + chunk.items, BLOCK_ROWS):
                last = min(first + BLOCK_ROWS, start + chunk.items)
                full = np.empty((last - first, len(old.spec.levels), old.spec.dim), dtype=source.dtype)
                full[:, list(old.varying)] = source[first:last]
                full[:, list(old.constant)] = known * committed[first:last, None, None]
                data = _raw(full[:, list(new.varying)])
                checksum = zlib.crc32(data, checksum)
                file.write(data)
            start += chunk.items
            del chunk.crc32[old.data_file]
            chunk.crc32[new.data_file] = checksum
        file.flush()
        os.fsync(file.fileno())


def _raw(array: np.ndarray) -> memoryview:
    """Return the bytes of an array."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write_after(path: Path, committed: int, content: bytes | memoryview) -> int:
    """Write `content` after the first `committed` bytes of a file, over any later bytes. Return its CRC-32."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(committed)
        file.seek(committed)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return zlib.crc32(content)


def _remove_superseded(folder: Path, manifest: Manifest) -> None:
    """Remove the data files of layouts that are no longer used."""
    names = "|".join(re.escape(name) for name in manifest.parts)
    used = {part.data_file for part in manifest.parts.values()}
    used |= {part.constant_file for part in manifest.parts.values() if part.has_constant}
    for path in folder.iterdir():
        if re.fullmatch(rf"({names})(\.\d+)?(\.constant)?\.bin", path.name) and path.name not in used:
            path.unlink()
