"""Tests of the hidden-state store: reading, appending, conversion of levels, errors."""

import os
import shutil
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from xsmoe.encoders import HiddenStateStore, ModalitySpec, StoreError
from xsmoe.encoders.append import write_lock
from xsmoe.encoders.manifest import Chunk, Manifest

SPECS = {"text": ModalitySpec(dim=5, levels=(0, 3, 6)), "image": ModalitySpec(dim=7, levels=(0, 2, 4))}


def rows(count: int, seed: int = 0, *, constant: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = {name: torch.randn(count, 3, spec.dim, generator=generator) for name, spec in SPECS.items()}
    if constant:
        for name, spec in SPECS.items():
            hidden[name][:, 0] = torch.linspace(1, 2, spec.dim)
    return hidden


def names(first: int, last: int) -> list[str]:
    return [f"i{number}" for number in range(first, last)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_appended_hidden_states_are_read_back_rounded_to_the_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    specs = {"text": ModalitySpec(dim=5, levels=(0, 3, 6), dtype=dtype)}
    first, second = rows(4)["text"], rows(3, seed=1)["text"]
    HiddenStateStore.create(tmp_path, specs).append(names(0, 4), {"text": first})
    HiddenStateStore.open(tmp_path).append(names(4, 7), {"text": list(second.unbind(1))})
    store = HiddenStateStore.open(tmp_path)
    store.verify()
    assert store.item_ids.tolist() == names(0, 7)
    assert (store.num_items, store.num_levels, store.dims, store.modalities) == (7, 3, {"text": 5}, ("text",))
    expected = torch.cat([first, second]).to(dtype).float()
    wanted = np.array([6, 0, 3, 3])
    for level, got in enumerate(store.hidden(wanted)["text"]):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected[wanted, level])
    assert torch.equal(store.hidden(torch.tensor([2]), dtype=dtype)["text"][1], expected[2:3, 1].to(dtype))


def test_ids_are_found_and_unknown_ones_are_minus_one(tmp_path: Path) -> None:
    store = HiddenStateStore.create(tmp_path, SPECS)
    odd = ["plain", "two\nlines", 'quote"', "é漢", ""]
    store.append(odd[:2], rows(2))
    assert store.index_of(["plain", '"']).tolist() == [0, -1]
    store.append(odd[2:], rows(3))
    for opened in (store, HiddenStateStore.open(tmp_path)):
        assert opened.item_ids.tolist() == odd
        assert opened.index_of(np.array(["é漢", "no", "", "two\nlines"])).tolist() == [3, -1, 4, 1]
        assert opened.index_of([]).shape == (0,)
    with pytest.raises(TypeError, match="must be strings.*int"):
        store.index_of(np.array([3]))


def test_items_that_lack_a_modality_have_zeros(tmp_path: Path) -> None:
    hidden = rows(4, constant=True)
    store = HiddenStateStore.create(tmp_path, SPECS)
    store.append(names(0, 4), hidden, {"image": np.array([True, False, True, False])})
    store.append(names(4, 5), {"text": rows(1, constant=True)["text"]})
    store = HiddenStateStore.open(tmp_path)
    assert store.present("text").tolist() == [True] * 5
    assert store.present("image").tolist() == [True, False, True, False, False]
    got = store.hidden(np.arange(5))["image"]
    for level in range(3):
        assert torch.equal(got[level][[1, 3, 4]], torch.zeros(3, 7))
        assert torch.equal(got[level][[0, 2]], hidden["image"][[0, 2], level].half().float())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.filterwarnings("error")
def test_files_are_mapped_to_be_read(tmp_path: Path) -> None:
    """A writable mapping, even a private one, counts as used memory, so a large store could not be opened."""
    HiddenStateStore.create(tmp_path, SPECS).append(names(0, 4), rows(4))
    store = HiddenStateStore.open(tmp_path)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) >= len(SPECS)
    assert {permissions[1] for _, permissions, *_ in mapped} == {"-"}
    assert store.hidden(np.array([1]))["text"][0].shape == (1, 5)


def test_a_constant_level_is_stored_once(tmp_path: Path) -> None:
    store = HiddenStateStore.create(tmp_path, SPECS)
    hidden = rows(6, constant=True)
    store.append(names(0, 4), {name: tensor[:4] for name, tensor in hidden.items()})
    store.append(names(4, 6), {name: tensor[4:] for name, tensor in hidden.items()})
    store = HiddenStateStore.open(tmp_path)
    assert (tmp_path / "text.bin").stat().st_size == 6 * 2 * 5 * 2
    got = store.hidden(np.array([5, 1]))["text"]
    assert [tuple(level.shape) for level in got] == [(1, 5), (2, 5), (2, 5)]
    assert torch.equal(got[0], hidden["text"][:1, 0].half().float())
    assert torch.equal(got[2], hidden["text"][[5, 1], 2].half().float())


def test_a_level_that_stops_being_constant_is_converted(tmp_path: Path) -> None:
    store = HiddenStateStore.create(tmp_path, SPECS)
    parts = [rows(4, constant=True), rows(2, seed=1, constant=True), rows(3, seed=2)]
    parts[2]["image"] = rows(3, seed=2, constant=True)["image"]
    has = [np.array([True, False, True, True]), np.ones(2, dtype=bool), np.array([True, True, False])]
    start = 0
    for hidden, mask in zip(parts, has, strict=True):
        store.append(names(start, start + len(mask)), hidden, {"text": mask})
        start += len(mask)
    assert not (tmp_path / "text.bin").exists()
    assert not list(tmp_path.glob("text*constant*"))
    expected = {name: torch.cat([hidden[name] for hidden in parts]).half().float() for name in SPECS}
    expected["text"] *= torch.from_numpy(np.concatenate(has))[:, None, None]
    for opened in (store, HiddenStateStore.open(tmp_path)):
        opened.verify()
        got = opened.hidden(np.arange(9))
        assert torch.equal(torch.stack(got["text"], 1), expected["text"])
        assert got["image"][0].shape == (1, 7)


def test_the_last_level_is_never_constant_and_single_items_grow_into_full_levels(tmp_path: Path) -> None:
    store = HiddenStateStore.create(tmp_path, SPECS)
    hidden = rows(3)
    for number in range(3):
        store.append([f"i{number}"], {name: tensor[number : number + 1] for name, tensor in hidden.items()})
        assert store.hidden(np.array([number, 0]))["text"][2].shape == (2, 5)
    for name, levels in HiddenStateStore.open(tmp_path).hidden(np.arange(3)).items():
        assert torch.equal(torch.stack(levels, 1), hidden[name].half().float())


def test_a_modality_that_only_later_items_have(tmp_path: Path) -> None:
    store = HiddenStateStore.create(tmp_path, SPECS)
    store.append(names(0, 3), {"text": rows(3)["text"]})
    assert [tuple(level.shape) for level in store.hidden(np.arange(3))["image"]] == [(3, 7)] * 3
    late = rows(2, seed=1, constant=True)
    store.append(names(3, 5), late)
    store = HiddenStateStore.open(tmp_path)
    store.verify()
    assert torch.equal(store.hidden(np.array([4]))["image"][0], late["image"][:1, 0].half().float())
    assert not torch.stack(store.hidden(np.arange(3))["image"]).any()


def test_no_items_requested_returns_no_rows(tmp_path: Path) -> None:
    store = HiddenStateStore.create(tmp_path, SPECS)
    store.append([], rows(0))
    assert store.num_items == 0
    store.append(names(0, 2), rows(2))
    assert store.hidden(np.array([], dtype=np.int64), ["image"])["image"][2].shape == (0, 7)


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    dim, count = 1 << 14, 20_000
    spec = {"text": ModalitySpec(dim=dim, levels=(0, 1, 2), dtype=torch.float32)}
    HiddenStateStore.create(tmp_path, spec)
    manifest = Manifest.new(spec)
    part = manifest.parts["text"]
    part.constant, part.num_present = (), count
    index, mask = "".join(f'"{i}"\n' for i in range(count)).encode(), b"\1" * count
    (tmp_path / "items.jsonl").write_bytes(index)
    (tmp_path / "text.present.bin").write_bytes(mask)
    with (tmp_path / "text.bin").open("wb") as file:
        file.truncate(count * part.row_bytes)
        file.seek((count - 1) * part.row_bytes)
        file.write(np.ones(3 * dim, dtype="<f4").tobytes())
    checksums = {"items.jsonl": zlib.crc32(index), "text.present.bin": zlib.crc32(mask), "text.bin": 0}
    manifest.chunks.append(Chunk(count, len(index), checksums))
    manifest.write(tmp_path)

    page, statm = os.sysconf("SC_PAGE_SIZE"), Path("/proc/self/statm")
    resident = int(statm.read_text().split()[1])
    tracemalloc.start()
    store = HiddenStateStore.open(tmp_path)
    got = store.hidden(np.array([count - 1, 3, *range(7000, 7008)]))["text"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    grown = (int(statm.read_text().split()[1]) - resident) * page
    assert (tmp_path / "text.bin").stat().st_size > 3 << 30
    assert torch.equal(got[2][0], torch.ones(dim))
    assert not got[2][1:].any()
    assert peak < 32 << 20
    assert grown < 64 << 20


def test_a_store_remains_usable_after_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_bytes
) -> None:
    parts = [rows(4, constant=True), rows(3, seed=1), rows(2, seed=2)]
    bounds = [(0, 4), (4, 7), (7, 9)]
    undisturbed = HiddenStateStore.create(tmp_path / "whole", SPECS)
    for (first, last), hidden in zip(bounds, parts, strict=True):
        undisturbed.append(names(first, last), hidden)
    base = HiddenStateStore.create(tmp_path / "base", SPECS)
    base.append(names(0, 4), parts[0])

    real, failed = os.fsync, 0
    while True:
        folder = tmp_path / f"broken at {failed}"
        shutil.copytree(tmp_path / "base", folder)
        calls = iter(range(10_000))

        def fsync(descriptor: int, stop: int = failed, calls=calls) -> None:
            if next(calls) == stop:
                raise OSError("disk full")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            HiddenStateStore.open(folder).append(names(4, 7), parts[1])
        except OSError:
            monkeypatch.setattr(os, "fsync", real)
        else:
            break
        store = HiddenStateStore.open(folder)
        store.verify()
        if store.num_items == 4:
            assert torch.equal(store.hidden(np.arange(4))["image"][1], parts[0]["image"][:, 1].half().float())
            store.append(names(4, 7), parts[1])
        assert store.num_items == 7
        store.append(names(7, 9), parts[2])
        assert folder_bytes(folder) == folder_bytes(tmp_path / "whole")
        failed += 1
    assert failed > 8


def test_the_manifest_changes_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HiddenStateStore.create(tmp_path, SPECS)
    store.append(names(0, 2), rows(2))

    def fail(source: Path, target: Path) -> None:
        raise OSError("no rename")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no rename"):
            store.append(names(2, 4), rows(2, seed=1))
    assert HiddenStateStore.open(tmp_path).item_ids.tolist() == names(0, 2)
    store.append(names(2, 5), rows(3, seed=2))
    reopened = HiddenStateStore.open(tmp_path)
    reopened.verify()
    assert reopened.item_ids.tolist() == names(0, 5)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name.startswith("manifest")) == [".json"]


def test_bytes_of_an_interrupted_append_are_ignored_and_overwritten(tmp_path: Path, folder_bytes) -> None:
    whole = HiddenStateStore.create(tmp_path / "whole", SPECS)
    torn = HiddenStateStore.create(tmp_path / "torn", SPECS)
    for store in (whole, torn):
        store.append(names(0, 4), rows(4))
    for name in ("items.jsonl", "text.bin", "image.bin", "image.present.bin"):
        with (tmp_path / "torn" / name).open("ab") as file:
            file.write(b"half a row")
    torn = HiddenStateStore.open(tmp_path / "torn")
    assert torn.num_items == 4
    torn.verify()
    for store in (whole, torn):
        store.append(names(4, 6), rows(2, seed=1))
    assert folder_bytes(tmp_path / "torn") == folder_bytes(tmp_path / "whole")


def test_two_writers_are_refused(tmp_path: Path) -> None:
    one = HiddenStateStore.create(tmp_path, SPECS)
    two = HiddenStateStore.open(tmp_path)
    one.append(["a"], rows(1))
    with pytest.raises(StoreError, match="another process; open it again"):
        two.append(["b"], rows(1))
    with write_lock(tmp_path), pytest.raises(StoreError, match="is being written by another process"):
        one.append(["b"], rows(1))
    one.append(["b"], rows(1))
    assert HiddenStateStore.open(tmp_path).item_ids.tolist() == ["a", "b"]


def test_invalid_appends_are_refused_and_do_not_change_the_store(tmp_path: Path, folder_bytes) -> None:
    store = HiddenStateStore.create(tmp_path, SPECS)
    store.append(names(0, 2), rows(2))
    before = folder_bytes(tmp_path)
    broken, huge = rows(2), rows(2)
    broken["text"][1, 2, 3] = float("nan")
    huge["image"][0, 0, 0] = 1e5
    bad = [
        (StoreError, "item 'i1' is already in store", (names(1, 3), rows(2))),
        (StoreError, "item 'x' occurs twice", (["x", "x"], rows(2))),
        (TypeError, "must be strings", ([1, 2], rows(2))),
        (ValueError, r"shape \(3, 3, 5\).*not \(2, 3, 5\)", (names(2, 5), rows(2))),
        (ValueError, "not finite in row 1", (names(2, 4), broken)),
        (ValueError, "100000 in row 0, which torch.float16 cannot hold; use a store in bfloat16", (names(2, 4), huge)),
        (ValueError, "no modality 'sound'", (names(2, 4), {"sound": rows(2)["text"]})),
        (ValueError, "row 1 has no modality", (names(2, 4), {"text": rows(2)["text"]}, {"text": [True, False]})),
        (ValueError, "hidden lacks 'image'", (names(2, 4), {"text": rows(2)["text"]}, {"image": [True, False]})),
        (ValueError, r"present\['text'\] must have shape \(2,\)", (names(2, 4), rows(2), {"text": [True]})),
    ]
    for error, message, arguments in bad:
        with pytest.raises(error, match=message):
            store.append(*arguments)
    assert folder_bytes(tmp_path) == before


def test_invalid_reads_are_refused(tmp_path: Path) -> None:
    store = HiddenStateStore.create(tmp_path, SPECS)
    store.append(names(0, 2), rows(2))
    with pytest.raises(ValueError, match=r"items must lie in \[0, 2\), but holds 2"):
        store.hidden(np.array([0, 2]))
    with pytest.raises(ValueError, match="holds -1"):
        store.hidden(torch.tensor([-1]))
    with pytest.raises(TypeError, match="must be integers"):
        store.hidden(np.array([0.5]))
    with pytest.raises(ValueError, match=r"shape \(N,\), not \(1, 1\)"):
        store.hidden(np.array([[0]]))
    with pytest.raises(ValueError, match="no modality 'sound'; there are text, image"):
        store.hidden(np.array([0]), ["sound"])
    with pytest.raises(ValueError, match="no modality 'sound'"):
        store.present("sound")


def test_fingerprint_covers_the_encoder_and_not_the_count(tmp_path: Path) -> None:
    def make(name: str, **changes) -> HiddenStateStore:
        settings = {"dim": 5, "levels": (0, 3, 6), "encoder": "bert", "options": {"size": (3, 4)}} | changes
        return HiddenStateStore.create(tmp_path / name, {"text": ModalitySpec(**settings)})

    store = make("a")
    empty = store.fingerprint()
    store.append(names(0, 3), {"text": rows(3)["text"]})
    assert store.fingerprint() == empty == HiddenStateStore.open(tmp_path / "a").fingerprint()
    known = store.fingerprint(2)
    store.append(names(3, 5), {"text": rows(2)["text"]})
    assert store.fingerprint(2) == known != store.fingerprint(3)
    assert make("b", transformers_version="9").fingerprint() == empty
    changes = [
        {"encoder": "roberta"},
        {"revision": "1"},
        {"pooling": "cls"},
        {"levels": (0, 3, 5)},
        {"dtype": torch.float32},
        {"last_level_normalised": True},
        {"options": {}},
    ]
    prints = {make(f"c{number}", **change).fingerprint() for number, change in enumerate(changes)}
    assert len(prints - {empty}) == len(changes)
    other = make("d")
    other.append(["i1", "i0"], {"text": rows(2)["text"]})
    assert other.fingerprint(2) != known
    with pytest.raises(ValueError, match=r"num_items must lie in \[0, 2\]"):
        other.fingerprint(3)


def test_specs_that_differ_are_named(tmp_path: Path) -> None:
    spec = ModalitySpec(dim=5, levels=(0, 3, 6), encoder="bert", revision="abc", options={"size": (3, 4)})
    store = HiddenStateStore.create(tmp_path, {"text": spec})
    store.check_specs({"text": ModalitySpec(dim=5, levels=(0, 3, 6), revision="abc", options={"size": [3, 4]})})
    other = ModalitySpec(dim=5, levels=(0, 3, 6), revision="xyz", pooling="cls", options={"size": [3, 4]})
    with pytest.raises(
        StoreError, match=r"'bert', encoder 'abc' \(given: 'xyz'\); pooling 'mean' \(given: 'cls'\)\. Use"
    ):
        store.check_specs({"text": other})
    with pytest.raises(StoreError, match="modalities text, but the encoders provide image, text"):
        store.check_specs({"text": spec, "image": spec})


def test_invalid_stores_are_refused(tmp_path: Path) -> None:
    spec = ModalitySpec(dim=5, levels=(0, 3))
    with pytest.raises(ValueError, match="at least one modality"):
        HiddenStateStore.create(tmp_path, {})
    with pytest.raises(ValueError, match="same number of levels"):
        HiddenStateStore.create(tmp_path, {"text": spec, "image": ModalitySpec(dim=5, levels=(0, 1, 2))})
    with pytest.raises(ValueError, match=r"'\.\./text' must consist of letters, digits, '_' and '-' only"):
        HiddenStateStore.create(tmp_path, {"../text": spec})
    for settings in ({"dim": 0}, {"levels": (0,)}, {"levels": (3, 0)}, {"levels": (-1, 0)}, {"dtype": torch.float64}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            ModalitySpec(**({"dim": 5, "levels": (0, 3)} | settings))
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"must be empty.*note\.txt"):
        HiddenStateStore.create(tmp_path, {"text": spec})
    HiddenStateStore.create(tmp_path / "new", {"text": spec})
    with pytest.raises(StoreError, match="already holds a hidden-state store"):
        HiddenStateStore.create(tmp_path / "new", {"text": spec})
