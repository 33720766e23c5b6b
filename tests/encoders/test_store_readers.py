"""Tests of a store's readers, and of a second writer, while another process converts a level."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xsmoe.encoders import HiddenStateStore, ModalitySpec, StoreError
from xsmoe.encoders.append import write_lock
from xsmoe.encoders.manifest import Manifest

SPECS = {"text": ModalitySpec(dim=4, levels=(0, 1, 2))}


def hidden(count: int, constant: int, seed: int = 0) -> torch.Tensor:
    """Return hidden states with this many constant levels, which are the first ones."""
    rows = torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(seed))
    rows[:, :constant] = 1
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a store of 3 items with two constant levels."""
    store = HiddenStateStore.create(tmp_path / "store", SPECS)
    store.append(["a", "b", "c"], {"text": hidden(3, constant=2)})
    return tmp_path / "store"


def convert(folder: Path, name: str, constant: int) -> None:
    HiddenStateStore.open(folder).append([name], {"text": hidden(1, constant, seed=1)})


def test_a_store_that_is_converted_during_opening_is_read_in_its_new_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, conversions = Manifest.read, iter([("d", 1), ("e", 0)])

    def read_and_be_overtaken(where: Path) -> Manifest:
        manifest = read(where)
        for conversion in conversions:
            with monkeypatch.context() as patch:
                patch.setattr(Manifest, "read", read)
                convert(folder, *conversion)
            break
        return manifest

    monkeypatch.setattr(Manifest, "read", read_and_be_overtaken)
    store = HiddenStateStore.open(folder)
    assert store.item_ids.tolist() == ["a", "b", "c", "d", "e"]
    assert torch.equal(store.hidden(torch.arange(3))["text"][2], hidden(3, constant=2)[:, 2].half().float())
    store.verify()


def test_a_file_removed_at_any_moment_of_opening_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def remove_first(path: Path, *arguments, **settings):
        if path.name == "text.bin":
            path.unlink(missing_ok=True)
        return real(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", remove_first)
    with pytest.raises(StoreError, match=r"text\.bin is missing, expected 24; restore it"):
        HiddenStateStore.open(folder)


@pytest.mark.parametrize("constant", [1, 0])
def test_a_store_that_was_converted_since_it_was_opened(folder: Path, constant: int) -> None:
    store = HiddenStateStore.open(folder)
    convert(folder, "d", constant)
    with pytest.raises(StoreError, match="converted by another process since it was opened; open it again"):
        store.verify()
    assert torch.equal(store.hidden(torch.arange(3))["text"][2], hidden(3, constant=2)[:, 2].half().float())
    HiddenStateStore.open(folder).verify()


def test_verify_checks_the_opened_state_if_the_store_has_only_grown(folder: Path) -> None:
    store = HiddenStateStore.open(folder)
    convert(folder, "d", constant=2)
    store.verify()


def test_verify_of_an_empty_store(tmp_path: Path) -> None:
    HiddenStateStore.create(tmp_path, SPECS).verify()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [shorten, Path.unlink])
@pytest.mark.parametrize("name", ["items.jsonl", "text.bin", "text.constant.bin", "text.present.bin"])
def test_verify_finds_damage_after_opening(
    folder: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    store = HiddenStateStore.open(tmp_path / "copy")
    damage(tmp_path / "copy" / name)
    with pytest.raises(StoreError, match=rf"{name} (is missing|has \d+ bytes).*; restore it from a copy"):
        store.verify()


def test_no_writer_can_write_between_a_commit_and_its_mapping(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real, mapped = HiddenStateStore.open(folder), HiddenStateStore._map, []

    def map_while_locked(self: HiddenStateStore) -> None:
        with pytest.raises(StoreError, match="being written by another process"), write_lock(folder):
            pass
        mapped.append(self)
        real(self)

    monkeypatch.setattr(HiddenStateStore, "_map", map_while_locked)
    store.append(["d"], {"text": hidden(1, constant=0)})
    assert mapped == [store]


def test_a_store_is_not_created_while_another_process_creates_one(tmp_path: Path) -> None:
    with write_lock(tmp_path), pytest.raises(StoreError, match="being written by another process"):
        HiddenStateStore.create(tmp_path, SPECS)
    HiddenStateStore.create(tmp_path, SPECS)
