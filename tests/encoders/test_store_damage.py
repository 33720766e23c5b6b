"""Tests of damaged stores: opening, verifying and appending name the damage."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from xsmoe.encoders import HiddenStateStore, ModalitySpec, StoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a store of 5 items in two chunks, with one constant level."""
    hidden = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    hidden[:, 0] = 1
    store = HiddenStateStore.create(tmp_path / "store", {"text": ModalitySpec(dim=4, levels=(0, 1, 2))})
    store.append(["a", "b", "c"], {"text": hidden[:3]})
    store.append(["d", "e"], {"text": hidden[3:]})
    store.verify()
    return tmp_path / "store"


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("text.bin", shorten, r"text\.bin has 79 bytes, expected 80; restore it from a copy, or encode again"),
        ("text.bin", Path.unlink, r"text\.bin is missing, expected 80"),
        ("text.constant.bin", shorten, r"constant\.bin has 7 bytes with checksum \d+, expected 8 bytes"),
        ("text.constant.bin", flip, r"constant\.bin has 8 bytes with checksum"),
        ("text.constant.bin", Path.unlink, r"constant\.bin is missing"),
        ("text.present.bin", shorten, r"present\.bin has 4 bytes, expected 5"),
        ("text.present.bin", flip, r"present\.bin, bytes 0 to 3: the checksum is \d+, expected \d+"),
        ("items.jsonl", shorten, r"items\.jsonl has 19 bytes, expected 20"),
        ("items.jsonl", flip, r"items\.jsonl, bytes 0 to 12: the checksum"),
        ("items.jsonl", Path.unlink, r"items\.jsonl is missing, expected 20"),
        ("manifest.json", shorten, r"manifest\.json cannot be read"),
        ("manifest.json", Path.unlink, r"no hidden-state store: manifest\.json is missing; encode the items first"),
    ],
)
def test_a_damaged_store_is_not_opened(folder: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    damage(folder / name)
    with pytest.raises(StoreError, match=message):
        HiddenStateStore.open(folder)


def test_verify_finds_a_flipped_bit(folder: Path) -> None:
    content = bytearray((folder / "text.bin").read_bytes())
    content[70] ^= 4
    (folder / "text.bin").write_bytes(bytes(content))
    store = HiddenStateStore.open(folder)
    with pytest.raises(StoreError, match=r"text\.bin, bytes 48 to 80: the checksum is \d+, expected \d+; restore"):
        store.verify()


def test_the_data_of_another_store_is_detected(folder: Path, tmp_path: Path) -> None:
    other = HiddenStateStore.create(tmp_path / "other", {"text": ModalitySpec(dim=4, levels=(0, 1, 2))})
    other.append(["v", "w", "x"], {"text": torch.zeros(3, 3, 4)})
    (folder / "text.present.bin").write_bytes((tmp_path / "other" / "text.present.bin").read_bytes() + b"\1\1")
    HiddenStateStore.open(folder)
    (folder / "items.jsonl").write_bytes((tmp_path / "other" / "items.jsonl").read_bytes() + b'"d"\n"e"\n')
    with pytest.raises(StoreError, match=r"items\.jsonl"):
        HiddenStateStore.open(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format="photos"), "is not the manifest of a hidden-state store"),
        (lambda m: m.update(version=2), "format version 2, this library reads version 1"),
        (lambda m: m.update(items=4), "counts 4 items, its chunks 5"),
        (lambda m: m.pop("chunks"), "missing or invalid entry: 'chunks'"),
        (lambda m: m["chunks"][0]["crc32"].pop("text.bin"), r"missing or invalid entry: 'text\.bin'"),
        (lambda m: m["modalities"]["text"].update(dtype="int8"), "missing or invalid entry: 'int8'"),
        (lambda m: m["modalities"]["text"].update(levels=[2, 1]), "levels must be two or more ascending"),
        (lambda m: m["modalities"]["text"].update(present=4), "5 items have the modality, .* counts 4"),
        (lambda m: m["modalities"]["text"].update(dim=400), r"constant\.bin has 8 bytes"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder: Path, change: Callable[[dict], None], message: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=message):
        HiddenStateStore.open(folder)


def test_a_store_that_was_damaged_after_opening_refuses_to_append(folder: Path) -> None:
    store = HiddenStateStore.open(folder)
    flip(folder / "text.constant.bin")
    with pytest.raises(StoreError, match=r"constant\.bin"):
        store.append(["f"], {"text": np.ones((1, 3, 4), dtype=np.float32)})
