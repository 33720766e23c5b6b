"""Streams from logs: selected interactions, and the numbers of users and items."""

import numpy as np
import pytest
import torch

from xsmoe.data import DataError, Interactions
from xsmoe.encoders import HiddenStateStore, ModalitySpec
from xsmoe.stream import Stream

LOG = [("ann", "a"), ("bob", "x"), ("ann", "b"), ("cid", "c"), ("bob", "a"), ("ann", "c")]


def log(pairs: list[tuple[str, str]] = LOG) -> Interactions:
    users, items = (np.array(column, dtype=object) for column in zip(*pairs, strict=True))
    return Interactions(users, items, np.arange(len(pairs), dtype=np.int64))


@pytest.fixture
def store(tmp_path) -> HiddenStateStore:
    """Return a store of items c, a and b. Item b has no image, item c no text."""
    specs = {name: ModalitySpec(dim=4, levels=(0, 1), dtype=torch.float32) for name in ("image", "text")}
    store = HiddenStateStore.create(tmp_path / "store", specs)
    present = {"image": np.array([True, True, False]), "text": np.array([False, True, True])}
    store.append(["c", "a", "b"], {name: torch.randn(3, 2, 4) for name in specs}, present)
    return store


def entered(stream: Stream) -> list[tuple[str, int]]:
    return [
        (stream.user_ids[user], item)
        for window in stream.windows
        for user, item in zip(window.users.tolist(), window.items.tolist(), strict=True)
    ]


def test_items_that_lack_a_modality_are_dropped_or_kept(store: HiddenStateStore) -> None:
    dropped = Stream.build(log(), store, 2)
    assert entered(dropped) == [("ann", 1), ("bob", 1)]
    assert (dropped.dropped.not_encoded, dropped.dropped.lacking_modality) == (1, 3)
    kept = Stream.build(log(), store, 2, missing="zero")
    assert entered(kept) == [("ann", 1), ("ann", 2), ("cid", 0), ("bob", 1), ("ann", 0)]
    assert kept.user_ids.tolist() == ["ann", "cid", "bob"], "numbered as they first appear"
    text = Stream.build(log(), store, 2, modalities=("text",))
    assert entered(text) == [("ann", 1), ("ann", 2), ("bob", 1)]


def test_new_users_are_numbered_after_known_ones(store: HiddenStateStore) -> None:
    known = np.array(["zoe", "bob"], dtype=object)
    stream = Stream.next_window(log(), store, 3, known, missing="zero")
    assert stream.user_ids.tolist() == ["zoe", "bob", "ann", "cid"]
    assert (stream.windows[0].number, stream.windows[0].users.tolist()) == (3, [2, 2, 3, 1, 2])


def test_empty_stream_is_rejected(store: HiddenStateStore) -> None:
    with pytest.raises(DataError, match="the items of 1 are not in the store, the items of 1 lack image or text"):
        Stream.build(log([("ann", "x"), ("ann", "b")]), store, 2)
    with pytest.raises(DataError, match="the store has no modality audio; it has image, text"):
        Stream.build(log(), store, 2, modalities=("audio",))
    with pytest.raises(ValueError, match="missing must be 'drop' or 'zero', not 'keep'"):
        Stream.build(log(), store, 2, missing="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_windows"):
        Stream.build(log(), store, 1, missing="zero")
