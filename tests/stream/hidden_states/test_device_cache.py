"""Device cache of hidden states: bitwise equal to the source."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stream import tiny
from tests.stream.tiny import needs_gpu
from xsmoe.encoders import HiddenStateStore, InMemoryFeatures, ItemFeatures, ModalitySpec
from xsmoe.stream import Stream, StreamConfig, StreamingTrainer
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.hidden_states import device_cache
from xsmoe.stream.hidden_states.device_cache import DeviceCachedFeatures
from xsmoe.stream.hidden_states.placement import cached_bytes, place

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 1 << 30


def in_memory(dtype: torch.dtype) -> InMemoryFeatures:
    """Return features with a level that is equal for all items, and with items that lack a modality."""
    generator = torch.Generator().manual_seed(0)
    levels = {
        name: [torch.randn(size, dim, generator=generator).to(dtype) for size in (1, tiny.NUM_ITEMS, tiny.NUM_ITEMS)]
        for name, dim in tiny.DIMS.items()
    }
    return InMemoryFeatures(levels, {"text": np.arange(tiny.NUM_ITEMS) % 5 != 3})


def stored(folder: Path, dtype: torch.dtype) -> HiddenStateStore:
    spec = {name: ModalitySpec(dim, (0, 1, 2), dtype, pooling="cls") for name, dim in tiny.DIMS.items()}
    store = HiddenStateStore.create(folder / "store", spec)
    source = in_memory(dtype)
    rows = {
        name: torch.stack(
            [level.expand(tiny.NUM_ITEMS, -1) for level in source.hidden(np.arange(tiny.NUM_ITEMS), [name])[name]], 1
        )
        for name in tiny.DIMS
    }
    store.append([str(item) for item in range(tiny.NUM_ITEMS)], rows, {"text": source.present("text")})
    return store


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["memory", "store"])
def test_cached_features_are_bitwise_equal_to_the_source(
    kind: str, dtype: torch.dtype, wanted: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_cache, "ITEMS_PER_CHUNK", 7)
    features: ItemFeatures = in_memory(dtype) if kind == "memory" else stored(tmp_path, dtype)
    placed = DeviceCachedFeatures(features, tuple(tiny.DIMS), DEVICE)
    assert placed.dtypes == dict.fromkeys(tiny.DIMS, dtype)
    shapes = set()
    for items in (np.array([0, 1, 5, 1]), np.array([3, 2, 8]), np.array([39]), np.array([], dtype=np.int64)):
        expected = features.hidden(items, dtype=wanted)
        for found in (
            placed.hidden(items, dtype=wanted),
            placed.gather(torch.from_numpy(items).to(DEVICE), placed.complete(items, tuple(tiny.DIMS)), wanted),
        ):
            assert found.keys() == expected.keys()
            for name, levels in expected.items():
                for mine, level in zip(found[name], levels, strict=True):
                    assert mine.device.type == DEVICE.type
                    assert mine.dtype == wanted
                    assert torch.equal(mine.cpu(), level), name
                shapes.add((name, levels[0].shape[0] == 1, len(items)))
    assert {("text", True, 4), ("text", False, 3)} <= shapes, "a constant level of some who lack it, and of others"


def test_cached_features_have_the_interface_of_the_source() -> None:
    features = in_memory(torch.float32)
    placed = DeviceCachedFeatures(features, ["text"], CPU)
    assert placed.modalities == ("text",)
    assert (placed.num_items, placed.num_levels, placed.dims) == (tiny.NUM_ITEMS, 3, {"text": tiny.DIMS["text"]})
    assert np.array_equal(placed.present("text"), features.present("text"))
    assert placed.fingerprint(3) == features.fingerprint(3)
    with pytest.raises(ValueError, match=r"items must lie in \[0, 40\), but holds 40"):
        placed.hidden(np.array([40]))
    with pytest.raises(ValueError, match="no modality 'image'"):
        placed.hidden(np.array([0]), ["image"])


def test_step_gathers_the_same_values_as_the_host() -> None:
    features = in_memory(torch.float16)
    placed = DeviceCachedFeatures(features, tuple(tiny.DIMS), CPU)
    for capacity in (None, Capacity(3, 6)):
        for users in (np.array([0]), np.array([1, 2])):
            expected = tiny.step_input(users, torch.bfloat16, capacity, features)
            given = tiny.step_input(users, torch.bfloat16, capacity, placed)
            assert not given.hidden
            found = given.with_hidden(placed, torch.bfloat16).hidden
            for name, levels in expected.hidden.items():
                for mine, level in zip(found[name], levels, strict=True):
                    assert torch.equal(mine, level)
    kinds = {tiny.step_input(np.array([user]), capacity=Capacity(3, 6), source=placed).graph_key() for user in (0, 1)}
    assert len(kinds) == 2, "users 1 has an item without text, so its levels have another shape"


def test_cache_respects_the_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    features, names = in_memory(torch.float16), tuple(tiny.DIMS)
    needed = sum((2 * tiny.NUM_ITEMS + 1) * dim * 2 for dim in tiny.DIMS.values())
    assert cached_bytes(features, names) == needed
    assert place(features, names, StreamConfig()) == (features, None), "the host has them already"
    assert place(features, names, StreamConfig(store_gib=0)) == (features, None)
    placed, message = place(features, names, StreamConfig(store_gib=needed / GIB))
    assert isinstance(placed, DeviceCachedFeatures)
    assert message is None
    placed, message = place(features, names, StreamConfig(store_gib=(needed - 1) / GIB))
    assert placed is features
    assert message is not None
    assert "need 0.00 GiB, but store_gib allows 0.00 GiB: every step copies its rows from the host" in message
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * needed - 4, 0))
    placed, message = place(features, names, StreamConfig(device="cuda"))
    assert placed is features
    assert message is not None
    assert "a quarter of the free memory of cuda (store_gib) allows" in message


def test_results_do_not_depend_on_the_device_cache() -> None:
    messages: list[str] = []
    lines = {}
    for gib in (None, 1.0, 1e-9):
        stream = Stream(tiny.windows(), in_memory(torch.float32))
        run = StreamingTrainer(
            tiny.model(), stream, tiny.config(store_gib=gib), listener=lambda event, fields: messages.append(event)
        )
        lines[gib] = tiny.without_time(run.fit())
        assert isinstance(run.features, DeviceCachedFeatures) == (gib == 1.0)
        assert messages.count("warning") == (gib == 1e-9), "said once"
        messages.clear()
    assert lines[None] == lines[1.0] == lines[1e-9]


@needs_gpu
def test_on_a_gpu_results_do_not_depend_on_the_device_cache() -> None:
    lines = [
        tiny.without_time(
            StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(device="cuda", store_gib=gib, graph=graph)).fit()
        )
        for graph in (True, False)
        for gib in (None, 0)
    ]
    assert lines[0] == lines[1]
    assert lines[2] == lines[3]
