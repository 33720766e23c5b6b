"""The manifest of a hidden-state store: the contents of its files, their encoder, and the committed state."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xsmoe.atomic_files import replace_file

MANIFEST = "manifest.json"
INDEX = "items.jsonl"
FORMAT = "xsmoe hidden states"
VERSION = 1

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class StoreError(ValueError):
    """A hidden-state store is damaged or does not fit the request."""


class MissingFileError(StoreError):
    """A file of the manifest is missing: it was lost, or another process replaced it after the manifest was read."""


@dataclass(frozen=True)
class ModalitySpec:
    """The kind of one modality's hidden states.

    Attributes:
        dim: their width D.
        levels: the encoder's layers that are stored, ascending; 0 is the embedding's output.
        dtype: the stored dtype: torch.float16, torch.bfloat16 or torch.float32.
        encoder: the encoder's name, for messages.
        revision: an id of its weights: a commit, or a digest of its files. If empty, the name identifies the encoder.
        pooling: the pooling over tokens, "cls" or "mean".
        last_level_normalised: whether the last level is the output of a normalisation layer.
        transformers_version: the version that computed them; for information, not part of `compatibility_key`.
        options: further settings that change the hidden states (text length, image size, ...), as JSON values.

    Raises:
        ValueError: dim is below 1, there are fewer than 2 levels, levels do not ascend, or the dtype is not supported.
    """

    dim: int
    levels: tuple[int, ...]
    dtype: torch.dtype = torch.float16
    encoder: str = "custom"
    revision: str = ""
    pooling: str = "mean"
    last_level_normalised: bool = False
    transformers_version: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(int(level) for level in self.levels))
        # Convert the options as the manifest will: JSON has no tuples.
        object.__setattr__(self, "options", json.loads(json.dumps(dict(self.options))))
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, not {self.dim}")
        if len(self.levels) < 2 or list(self.levels) != sorted(set(self.levels)) or self.levels[0] < 0:
            raise ValueError(f"levels must be two or more ascending layer numbers from 0 on, not {self.levels}")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(f'torch.{name}' for name in DTYPES)}, not {self.dtype}")

    def compatibility_key(self) -> dict[str, Any]:
        """Return the values that must be equal for two sets of hidden states to be of the same kind."""
        return {
            "encoder": self.revision or self.encoder,
            "pooling": self.pooling,
            "levels": list(self.levels),
            "last_level_normalised": self.last_level_normalised,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "options": dict(self.options),
        }


def check_specs(folder: Path, stored: Mapping[str, ModalitySpec], given: Mapping[str, ModalitySpec]) -> None:
    """Raise StoreError that names the differences unless `given` is of the same kind as `stored`."""
    if set(stored) != set(given):
        raise StoreError(
            f"store {folder} holds the modalities {', '.join(sorted(stored))}, but the encoders provide "
            f"{', '.join(sorted(given))}; use the same modalities, or encode into another folder"
        )
    for name, spec in stored.items():
        mine, other = spec.compatibility_key(), given[name].compatibility_key()
        differences = [f"{key} {mine[key]!r} (given: {other[key]!r})" for key in mine if mine[key] != other[key]]
        if differences:
            raise StoreError(
                f"store {folder}, modality {name}: encoded with {spec.encoder!r}, {'; '.join(differences)}. "
                f"Use the encoder and settings of the store (given: {given[name].encoder!r}), or another folder"
            )


@dataclass
class Part:
    """The state of one modality in the store.

    Attributes:
        spec: the kind of its hidden states.
        constant: indices into `spec.levels` of levels whose row is the same for every present item so far. They are
            stored once. The last level is never among them.
        generation: a number that grows when the layout of the data file changes. The file's name contains it.
        num_present: number of committed items that have this modality.
        constant_crc32: CRC-32 of the file of constant rows; None if there is no such file.
    """

    name: str
    spec: ModalitySpec
    constant: tuple[int, ...]
    generation: int = 0
    num_present: int = 0
    constant_crc32: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"modality {self.name!r} must consist of letters, digits, '_' and '-' only")

    @property
    def varying(self) -> tuple[int, ...]:
        """Indices into `spec.levels` of the levels in the data file, which has one row per item."""
        return tuple(place for place in range(len(self.spec.levels)) if place not in self.constant)

    @property
    def row_bytes(self) -> int:
        """Bytes per item of the data file."""
        return len(self.varying) * self.spec.dim * self.spec.dtype.itemsize

    @property
    def data_file(self) -> str:
        return f"{self.name}.bin" if self.generation == 0 else f"{self.name}.{self.generation}.bin"

    @property
    def constant_file(self) -> str:
        return self.data_file.removesuffix("bin") + "constant.bin"

    @property
    def present_file(self) -> str:
        return f"{self.name}.present.bin"

    @property
    def has_constant(self) -> bool:
        """Whether there is a file of constant rows: a level is constant, and an item has the modality."""
        return bool(self.constant) and self.num_present > 0


@dataclass
class Chunk:
    """Items that were appended together. `crc32` maps a file's name to the checksum of the bytes appended to it."""

    items: int
    index_bytes: int
    crc32: dict[str, int]


@dataclass
class Manifest:
    """The committed state of a store. Further bytes in the files belong to an interrupted append."""

    parts: dict[str, Part]
    chunks: list[Chunk] = field(default_factory=list)

    @classmethod
    def new(cls, specs: Mapping[str, ModalitySpec]) -> "Manifest":
        """Return the manifest of an empty store. Raise ValueError for modalities that cannot share a store."""
        if not specs:
            raise ValueError("modalities must name at least one modality, but is empty")
        counts = {name: len(spec.levels) for name, spec in specs.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"all modalities must have the same number of levels, not {counts}")
        return cls(
            {name: Part(name, spec, constant=tuple(range(len(spec.levels) - 1))) for name, spec in specs.items()}
        )

    @property
    def items(self) -> int:
        return sum(chunk.items for chunk in self.chunks)

    @property
    def index_bytes(self) -> int:
        return sum(chunk.index_bytes for chunk in self.chunks)

    def write(self, folder: Path) -> None:
        """Replace the manifest of `folder` atomically, after all earlier writes are on disk."""
        replace_file(folder / MANIFEST, json.dumps(self._as_json(), indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of `folder`. Raise StoreError if there is none, or if it is damaged."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(
                f"{folder} is no hidden-state store: {MANIFEST} is missing; encode the items first"
            ) from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); restore it from a copy, or encode again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreError(f"{path} is not the manifest of a hidden-state store; give the folder of one")
        if content.get("version") != VERSION:
            raise StoreError(
                f"{path} has format version {content.get('version')}, this library reads version {VERSION}; "
                "use the library's version that wrote it, or encode again"
            )
        try:
            manifest = cls._from_json(content)
            counted, parts = content["items"], {name: part.num_present for name, part in manifest.parts.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"{path} has a missing or invalid entry: {error}; restore it from a copy, or encode again"
            ) from error
        if counted != manifest.items or any(not 0 <= count <= counted for count in parts.values()):
            raise StoreError(
                f"{path} counts {counted} items, its chunks {manifest.items}, its modalities {parts}; "
                "restore it from a copy, or encode again"
            )
        return manifest

    def _as_json(self) -> dict[str, Any]:
        modalities = {}
        for name, part in self.parts.items():
            spec = part.spec
            modalities[name] = {
                "encoder": spec.encoder,
                "revision": spec.revision,
                "transformers_version": spec.transformers_version,
                "pooling": spec.pooling,
                "levels": list(spec.levels),
                "last_level_normalised": spec.last_level_normalised,
                "dim": spec.dim,
                "dtype": str(spec.dtype).removeprefix("torch."),
                "options": dict(spec.options),
                "present": part.num_present,
                "generation": part.generation,
                "constant_levels": [spec.levels[place] for place in part.constant],
                "constant_crc32": part.constant_crc32,
            }
        chunks = [{"items": c.items, "index_bytes": c.index_bytes, "crc32": c.crc32} for c in self.chunks]
        return {
            "format": FORMAT,
            "version": VERSION,
            "items": self.items,
            "modalities": modalities,
            "chunks": chunks,
        }

    @classmethod
    def _from_json(cls, content: Mapping[str, Any]) -> "Manifest":
        parts = {}
        for name, entry in content["modalities"].items():
            spec = ModalitySpec(
                dim=entry["dim"],
                levels=tuple(entry["levels"]),
                dtype=DTYPES[entry["dtype"]],
                encoder=entry["encoder"],
                revision=entry["revision"],
                pooling=entry["pooling"],
                last_level_normalised=entry["last_level_normalised"],
                transformers_version=entry["transformers_version"],
                options=entry["options"],
            )
            constant = tuple(spec.levels.index(level) for level in entry["constant_levels"])
            parts[name] = Part(name, spec, constant, entry["generation"], entry["present"], entry["constant_crc32"])
        chunks = [Chunk(chunk["items"], chunk["index_bytes"], chunk["crc32"]) for chunk in content["chunks"]]
        files = [INDEX, *(name for part in parts.values() for name in (part.data_file, part.present_file))]
        for chunk in chunks:
            for name in files:
                int(chunk.crc32[name])
        return cls(parts, chunks)
