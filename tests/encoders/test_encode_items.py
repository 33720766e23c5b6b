"""Tests of encoding items into a store: results, reports, interruptions, errors."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from xsmoe.encoders import EncodeReport, HiddenStateStore, ImageEncoder, StoreError, TextEncoder, encode_items

Make = Callable[[int], Any]
Bytes = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def encoders(text_encoder: TextEncoder, image_encoder: ImageEncoder) -> dict[str, TextEncoder | ImageEncoder]:
    return {"text": text_encoder, "image": image_encoder}


def patchy(make_items: Make, pictures: Path, scratch: Path) -> tuple[Any, Path]:
    """Return 40 items. Some lack text, image or both. Some images are broken; one is its item's only modality."""
    items = make_items(40)
    for name in items.images:
        (scratch / name).write_bytes((pictures / name).read_bytes())
    items.texts[[3, 9, 21]] = None
    items.texts[4] = "  "
    items.images[[5, 9]] = None
    (scratch / "6.png").unlink()
    (scratch / "7.png").write_bytes(b"broken")
    (scratch / "21.png").write_bytes(b"broken")
    return items, scratch


def test_the_store_holds_the_encoders_hidden_states(make_items: Make, pictures: Path, encoders, tmp_path: Path) -> None:
    items = make_items(20)
    seen: list[tuple[int, int]] = []
    report = encode_items(
        items,
        pictures,
        tmp_path / "store",
        encoders,
        batch_size=6,
        dtype=torch.float32,
        chunk_items=8,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report == EncodeReport(20, 0, {"text": 0, "image": 0}, [], [])
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (40, 40)
    store = HiddenStateStore.open(tmp_path / "store")
    store.verify()
    assert store.item_ids.tolist() == items.ids.tolist()
    store.check_specs({name: encoder.spec(torch.float32) for name, encoder in encoders.items()})
    values = {"text": items.texts.tolist(), "image": [pictures / name for name in items.images]}
    for name, levels in store.hidden(np.arange(20)).items():
        expected = encoders[name].encode(values[name])
        torch.testing.assert_close(torch.stack(levels, 1), expected, rtol=1e-5, atol=1e-5)


def test_cls_stores_level_0_once(make_items: Make, pictures: Path, text_folder: Path, image_folder, tmp_path) -> None:
    encoders = {"text": TextEncoder(text_folder, pooling="cls"), "image": ImageEncoder(image_folder, pooling="cls")}
    encode_items(make_items(20), pictures, tmp_path, encoders, chunk_items=7)
    hidden = HiddenStateStore.open(tmp_path).hidden(np.arange(20))
    for levels in hidden.values():
        assert [len(level) for level in levels] == [1, 20, 20]


def test_missing_and_broken_values_are_counted(make_items: Make, pictures: Path, encoders, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    items, root = patchy(make_items, pictures, tmp_path / "images")
    report = encode_items(items, root, tmp_path / "store", encoders, chunk_items=16)
    assert (report.encoded, report.already_present) == (38, 0)
    assert report.missing == {"text": 2, "image": 3}
    assert report.dropped == ["item 9", "item 21"]
    assert [(one.item, one.modality) for one in report.unreadable] == [
        ("item 6", "image"),
        ("item 7", "image"),
        ("item 21", "image"),
    ]
    assert "6.png cannot be read (there is no such file)" in report.unreadable[0].reason
    assert str(report) == (
        "38 items encoded, 2 without text, 3 without image; 0 were there already; 2 dropped with nothing to encode; "
        "3 values could not be read"
    )
    store = HiddenStateStore.open(tmp_path / "store")
    assert store.index_of(["item 9", "item 21"]).tolist() == [-1, -1]
    assert store.item_ids[~store.present("text")].tolist() == ["item 3", "item 4"]
    assert store.item_ids[~store.present("image")].tolist() == ["item 5", "item 6", "item 7"]
    with pytest.raises(ValueError, match=r"image .*6\.png cannot be read"):
        encode_items(items, root, tmp_path / "strict", encoders, on_error="raise")


class Stop(Exception):
    pass


def test_a_resumed_run_ends_with_the_same_bytes(
    make_items: Make, pictures: Path, encoders, tmp_path: Path, folder_bytes: Bytes
) -> None:
    (tmp_path / "images").mkdir()
    items, root = patchy(make_items, pictures, tmp_path / "images")
    settings = {"batch_size": 5, "chunk_items": 8}
    encode_items(items, root, tmp_path / "whole", encoders, **settings)
    stops = 0

    def stop(done: int, total: int) -> None:
        if done > 17:
            raise Stop

    while True:
        try:
            report = encode_items(items, root, tmp_path / "torn", encoders, **settings, progress=stop)
        except Stop:
            stops += 1
            continue
        break
    assert stops >= 3
    assert report.encoded + report.already_present == 38
    assert report.encoded < 20
    assert folder_bytes(tmp_path / "torn") == folder_bytes(tmp_path / "whole")


KILLED = """
import os, pickle, signal, sys
from xsmoe.encoders import TextEncoder, encode_items
items, text_folder, store, at = pickle.load(sys.stdin.buffer)
real, calls = os.fsync, iter(range(10_000))
def fsync(descriptor):
    if next(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
encode_items(items, ".", store, {"text": TextEncoder(text_folder)}, batch_size=5, chunk_items=8)
"""


def test_a_killed_process_loses_no_commit(
    make_items: Make, text_folder: Path, text_encoder: TextEncoder, tmp_path: Path, folder_bytes: Bytes
) -> None:
    items = SimpleNamespace(**vars(make_items(40)))
    store = tmp_path / "torn"
    # The 12th sync is that of the second chunk's data, which is on disk but not committed.
    call = pickle.dumps((items, str(text_folder), str(store), 12))
    process = subprocess.run([sys.executable, "-c", KILLED], input=call, timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL
    left = HiddenStateStore.open(store)
    assert left.num_items == 8
    assert os.path.getsize(store / "text.bin") > 8 * 3 * 32 * 2
    left.verify()
    encoders = {"text": text_encoder}
    report = encode_items(items, ".", store, encoders, batch_size=5, chunk_items=8)
    assert (report.already_present, report.encoded) == (8, 32)
    encode_items(items, ".", tmp_path / "whole", encoders, batch_size=5, chunk_items=8)
    assert folder_bytes(store) == folder_bytes(tmp_path / "whole")


def test_new_items_are_appended(make_items: Make, pictures: Path, encoders, tmp_path: Path) -> None:
    encode_items(make_items(10), pictures, tmp_path, encoders)
    before = HiddenStateStore.open(tmp_path)
    old = before.hidden(np.arange(10))["text"][1]
    report = encode_items(make_items(13), pictures, tmp_path, encoders)
    assert (report.encoded, report.already_present) == (3, 10)
    store = HiddenStateStore.open(tmp_path)
    assert store.item_ids.tolist() == [f"item {i}" for i in range(13)]
    assert torch.equal(store.hidden(np.arange(10))["text"][1], old)
    assert store.fingerprint(10) == before.fingerprint(10)
    again = encode_items(make_items(13), pictures, tmp_path, encoders)
    assert (again.encoded, again.already_present) == (0, 13)


def test_the_store_of_another_encoder_is_refused(
    make_items: Make, pictures: Path, encoders, text_folder: Path, tmp_path: Path, folder_bytes: Bytes
) -> None:
    encode_items(make_items(5), pictures, tmp_path, encoders)
    before = folder_bytes(tmp_path)
    others = [
        ({"text": TextEncoder(text_folder, pooling="cls")}, {}, r"pooling 'mean' \(given: 'cls'\)"),
        ({"text": TextEncoder(text_folder, levels=(0, 2))}, {}, r"levels \[0, 1, 2\] \(given: \[0, 2\]\)"),
        ({"text": TextEncoder(text_folder, max_tokens=9)}, {}, "options .*'max_tokens': 40"),
        ({}, {"dtype": torch.float32}, r"dtype 'float16' \(given: 'float32'\)"),
    ]
    for change, settings, message in others:
        with pytest.raises(StoreError, match=message):
            encode_items(make_items(6), pictures, tmp_path, encoders | change, **settings)
    with pytest.raises(StoreError, match="holds the modalities image, text, but the encoders provide text"):
        encode_items(make_items(6), pictures, tmp_path, {"text": encoders["text"]})
    assert folder_bytes(tmp_path) == before


def test_nothing_to_encode_is_an_error_and_leaves_no_store(
    make_items: Make, pictures: Path, encoders, tmp_path: Path
) -> None:
    bare, broken, none = make_items(3), make_items(3), make_items(0)
    bare.texts[:], bare.images[:] = None, None
    broken.texts[:] = None
    (tmp_path / "images").mkdir()
    for name in broken.images:
        (tmp_path / "images" / name).write_bytes(b"broken")
    for items, message in (
        (bare, r"none of the 3 items has anything to encode for text, image: 0 values could not be read\. Give"),
        (broken, r"3 values could not be read; the first: image .*0\.png cannot be read"),
        (none, "none of the 0 items"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_items(items, tmp_path / "images", tmp_path / "store", encoders)
    with pytest.raises(ValueError, match=r"not one of the 3 images exists, .*image_root .* not .*nowhere"):
        encode_items(make_items(3), tmp_path / "nowhere", tmp_path / "store", encoders)
    assert not (tmp_path / "store").exists()


def test_arguments_are_checked(make_items: Make, pictures: Path, encoders, tmp_path: Path) -> None:
    twice = make_items(3)
    twice.ids[2] = "item 0"
    for items, change, message in (
        (make_items(3), {"encoders": {}}, "at least one modality"),
        (make_items(3), {"on_error": "ignore"}, "on_error must be 'raise' or 'skip'"),
        (make_items(3), {"chunk_items": 0}, "chunk_items must be at least 1"),
        (twice, {}, "items.ids must be distinct, but an id occurs more than once"),
    ):
        arguments = {"encoders": encoders} | change
        with pytest.raises(ValueError, match=message):
            encode_items(items, pictures, tmp_path / "store", **arguments)
