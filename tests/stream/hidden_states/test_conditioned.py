"""Conditioned hidden states in a stream: bitwise equal in every location, and exact when a run is resumed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.stream import tiny
from tests.stream.tiny import Killed
from xsmoe.encoders import HiddenStateStore, InMemoryFeatures, ItemFeatures, ModalitySpec, StoreError
from xsmoe.nn import Recommender, XSMoE
from xsmoe.nn.conditioning import BLOCK
from xsmoe.stream import CheckpointError, Stream, StreamingTrainer
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.hidden_states import conditioned, conditioned_store, device_cache, placement
from xsmoe.stream.hidden_states.conditioned import ConditionedFeatures, fit_conditions
from xsmoe.stream.hidden_states.conditioned_store import ConditionedStore
from xsmoe.stream.hidden_states.device_cache import DeviceCachedFeatures
from xsmoe.stream.hidden_states.placement import place
from xsmoe.stream.state.kept_weights import restore_snapshot, snapshot

CPU = torch.device("cpu")
NAMES = tuple(tiny.DIMS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def in_memory(dtype: torch.dtype = torch.float32, num_items: int = tiny.NUM_ITEMS) -> InMemoryFeatures:
    """Return features with a level that all items share, one with equal rows, and items that lack a modality."""
    generator = torch.Generator().manual_seed(0)
    levels = {}
    for name, dim in tiny.DIMS.items():
        rows = [5 + torch.randn(size, dim, generator=generator).to(dtype) for size in (1, tiny.NUM_ITEMS, 1)]
        top = torch.randn(tiny.NUM_ITEMS, dim, generator=generator).to(dtype)
        levels[name] = [rows[0], rows[1][:num_items], rows[2].expand(num_items, -1), top[:num_items]]
    return InMemoryFeatures(levels, {"text": np.arange(num_items) % 5 != 3})


def store_of(folder: Path, source: ItemFeatures, names: tuple[str, ...] = NAMES) -> HiddenStateStore:
    """Write features to a store."""
    spec = {
        name: ModalitySpec(source.dims[name], tuple(range(source.num_levels)), source.dtypes[name]) for name in names
    }
    store = HiddenStateStore.create(folder, spec)
    append(store, source, np.arange(source.num_items))
    return store


def append(store: HiddenStateStore, source: ItemFeatures, rows: np.ndarray) -> None:
    hidden = {name: source.hidden(rows, [name], dtype=source.dtypes[name])[name] for name in store.modalities}
    present = {name: source.present(name)[rows] for name in store.modalities}
    store.append([f"item {row}" for row in rows], hidden, present)


def encoder(features: ItemFeatures, condition: str = "whiten", rows: np.ndarray | None = None) -> XSMoE:
    """Return an item encoder whose conditioning is fitted to some items of the features, default all."""
    found = XSMoE.from_config(
        {"modalities": NAMES, "dim": tiny.DIMS, "num_levels": features.num_levels - 1, "rank": 2, "out_dim": 8}
        | {"condition": condition}
    )
    fit_conditions(found, features, np.arange(features.num_items) if rows is None else rows)
    return found


def same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> bool:
    return found.keys() == expected.keys() and all(
        mine.shape == level.shape and mine.dtype == level.dtype and torch.equal(mine, level)
        for name in expected
        for mine, level in zip(found[name], expected[name], strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["memory", "store"])
@pytest.mark.parametrize("condition", ["whiten", "standardize"])
def test_conditioned_features_are_bitwise_equal_lazily_in_memory_and_on_disk(
    condition: str, kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (device_cache, conditioned_store, conditioned):
        monkeypatch.setattr(module, "ITEMS_PER_CHUNK", 7)
    features = in_memory(dtype) if kind == "memory" else store_of(tmp_path / "store", in_memory(dtype))
    items = encoder(features, condition)
    lazy = ConditionedFeatures(features, items)
    others = [DeviceCachedFeatures(lazy, NAMES, CPU), ConditionedStore.open(tmp_path / "conditioned", lazy)]
    for rows in (np.arange(tiny.NUM_ITEMS), np.array([39, 3, 3, 8]), np.array([0, 1]), np.array([], dtype=np.int64)):
        for wanted in (dtype, torch.float32):
            expected = lazy.hidden(rows, dtype=wanted)
            for other in others:
                assert same(other.hidden(rows, dtype=wanted), expected)
    raw = features.hidden(np.arange(40), dtype=dtype)
    found = lazy.hidden(np.arange(40), dtype=dtype)
    for name in NAMES:
        present = torch.from_numpy(features.present(name))
        assert same({name: items.condition(name, raw[name], present)}, {name: found[name]})
        assert not found[name][1][~present].any()
        assert not torch.equal(found[name][1], raw[name][1])
        assert torch.equal(found[name][2], raw[name][2]), "a level of equal rows"
    for other in others:
        assert (other.modalities, other.dims, other.dtypes) == (lazy.modalities, lazy.dims, lazy.dtypes)
        assert (other.num_items, other.num_levels) == (lazy.num_items, lazy.num_levels)
        assert other.fingerprint(3) == lazy.fingerprint(3) != features.fingerprint(3)
        assert np.array_equal(other.present("text"), lazy.present("text"))


def test_row_is_bitwise_independent_of_other_requested_rows() -> None:
    count, dim = 3 * BLOCK + 5, 67
    generator = torch.Generator().manual_seed(0)
    features = InMemoryFeatures({"text": torch.randn(count, 3, dim, generator=generator)})
    items = XSMoE(("text",), dim, rank=2, out_dim=4, condition="whiten")
    fit_conditions(items, features, np.arange(50))
    lazy = ConditionedFeatures(features, items)
    whole = lazy.hidden(np.arange(count))["text"]
    for rows in (np.array([count - 1]), np.arange(count)[::-1].copy(), np.array([5, 5 + BLOCK, 5, 130, 200])):
        for found, level in zip(lazy.hidden(rows)["text"], whole, strict=True):
            assert torch.equal(found, level[torch.from_numpy(rows)])


def test_item_has_a_fixed_position_in_a_block() -> None:
    rows = np.array([5, 5 + BLOCK, 5, 130, 200, 0])
    places = conditioned._places(rows)
    assert np.array_equal(places % BLOCK, rows % BLOCK)
    assert len(set(places.tolist())) == len(rows)
    assert places.max() < 3 * BLOCK
    assert np.array_equal(conditioned._places(np.arange(BLOCK, 3 * BLOCK)), np.arange(2 * BLOCK))


def test_an_overflow_names_the_item_and_its_modality(tmp_path: Path) -> None:
    source = in_memory(torch.float16)
    source._levels["image"][1] = 1e-4 * source._levels["image"][1]
    source._levels["image"][1][7, 2] = 60000
    store = store_of(tmp_path, source)
    items = encoder(store, "standardize", np.arange(5))
    with pytest.raises(ValueError, match=r"item 'item 7', image, level 1: .* exceeds torch.float16; use hidden states"):
        ConditionedFeatures(store, items).hidden(np.array([6, 7]))
    with pytest.raises(ValueError, match="item 7, image, level 1"):
        ConditionedFeatures(source, items).hidden(np.array([6, 7]))


def test_features_of_another_shape_are_rejected() -> None:
    with pytest.raises(ValueError, match="features have widths .* and 3 levels, but the item encoder needs .* and 4"):
        ConditionedFeatures(tiny.features(), encoder(in_memory()))


def test_fit_counts_each_item_once_and_skips_items_without_the_modality() -> None:
    features = in_memory()
    several = encoder(features, rows=np.array([9, 1, 1, 3, 8, 9]))
    once = encoder(features, rows=np.array([1, 3, 8, 9]))
    without = encoder(features, rows=np.array([1, 9]))
    assert same_conditions(several, once)
    for name, value in without.conditions()["text"].state_dict().items():
        assert torch.equal(value, once.conditions()["text"].state_dict()[name]), name
    assert not same_conditions(without, once)
    assert encoder(features, rows=np.array([3, 8])).conditioned() == ("image",)
    broken = in_memory()
    broken._levels["text"][1][4] = torch.inf
    with pytest.raises(ValueError, match="text: hidden states are not finite"):
        encoder(broken)


def same_conditions(first: XSMoE, second: XSMoE) -> bool:
    mine, other = first.conditioning.state_dict(), second.conditioning.state_dict()
    return all(torch.equal(value, other[name]) for name, value in mine.items())


def test_conditioned_store_is_resumed_extended_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditioned_store, "ITEMS_PER_CHUNK", 7)
    features, folder = in_memory(), tmp_path / "conditioned"
    store = store_of(tmp_path / "store", in_memory(num_items=22))
    items = encoder(store)
    calls = 0
    appended = HiddenStateStore.append

    def dying(self: HiddenStateStore, *given: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        appended(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStateStore, "append", dying)
        with pytest.raises(Killed):
            ConditionedStore.open(folder, ConditionedFeatures(store, items))
    made: list[int] = []
    monkeypatch.setattr(
        HiddenStateStore,
        "append",
        lambda self, ids, *given, **named: (made.append(len(ids)), appended(self, ids, *given, **named))[1],
    )
    assert ConditionedStore.open(folder, ConditionedFeatures(store, items)).num_items == 22
    assert made == [7, 1], "what was committed before is kept"
    append(store, features, np.arange(22, 30))
    made.clear()
    lazy = ConditionedFeatures(store, items)
    grown = ConditionedStore.open(folder, lazy)
    assert made == [7, 1]
    assert same(grown.hidden(np.arange(30)), lazy.hidden(np.arange(30)))

    other = ConditionedFeatures(store, encoder(store, "standardize"))
    replaced = ConditionedStore.open(folder, other)
    assert same(replaced.hidden(np.arange(30)), other.hidden(np.arange(30)))
    assert len(list(folder.iterdir())) == 1
    # Same encoder and conditioning, but other items in these rows.
    reordered = HiddenStateStore.create(tmp_path / "reordered", store.specs)
    append(reordered, features, np.arange(30)[::-1].copy())
    another = ConditionedFeatures(reordered, encoder(store, "standardize"))
    assert another.fingerprint() == other.fingerprint()
    again = ConditionedStore.open(folder, another)
    assert same(again.hidden(np.arange(30)), another.hidden(np.arange(30)))


def test_damaged_conditioned_store_is_rejected_and_can_be_rebuilt(tmp_path: Path) -> None:
    lazy = ConditionedFeatures(in_memory(), encoder(in_memory()))
    ConditionedStore.open(tmp_path, lazy)
    (place_of,) = tmp_path.iterdir()
    file = place_of / "image.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"conditioned hidden states is damaged: .*image.bin.* checksum .* remove"):
        ConditionedStore.open(tmp_path, lazy)
    # An interrupted removal does not leave a store.
    (place_of / "manifest.json").unlink()
    assert same(ConditionedStore.open(tmp_path, lazy).hidden(np.arange(40)), lazy.hidden(np.arange(40)))


def test_conditioned_store_may_have_items_without_any_model_modality(tmp_path: Path) -> None:
    features = in_memory()
    items = XSMoE(("text",), tiny.DIMS["text"], num_levels=3, rank=2, out_dim=8, condition="whiten")
    fit_conditions(items, features, np.arange(40))
    lazy = ConditionedFeatures(features, items)
    found = ConditionedStore.open(tmp_path, lazy)
    assert found.modalities == lazy.modalities == ("text",)
    assert same(found.hidden(np.array([3, 4])), lazy.hidden(np.array([3, 4])))


def test_default_location_of_conditioned_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = ConditionedFeatures(in_memory(), encoder(in_memory()))
    placed, message = place(lazy, NAMES, StreamConfig())
    assert isinstance(placed, DeviceCachedFeatures)
    assert message is None
    assert place(lazy, NAMES, StreamConfig(store_gib=0)) == (lazy, None)
    monkeypatch.setattr(placement, "available_memory", lambda: 4 * placement.cached_bytes(lazy, NAMES) - 4)
    placed, message = place(lazy, NAMES, StreamConfig())
    assert placed is lazy
    assert message is not None
    assert "a quarter of the available memory of cpu (store_gib) allows" in message
    assert "conditioned rows are kept on disk, and every step copies its rows from the host" in message


def run(
    folder: Path | None = None,
    listener: Any = None,
    *,
    condition: str = "whiten",
    source: ItemFeatures | None = None,
    windows: int = 2,
    **options: Any,
) -> tuple[list[dict[str, Any]], Recommender]:
    features = tiny.features() if source is None else source
    model = tiny.model(condition=condition)
    stream = Stream(tiny.windows(windows), features)
    with StreamingTrainer(
        model, stream, tiny.config(**{"epochs": 2, **options}), folder=folder, listener=listener
    ) as trainer:
        return tiny.without_time(trainer.fit()), model


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[list[dict[str, Any]], Recommender]:
    return run()


def test_run_is_fitted_to_the_first_training_split_and_independent_of_row_location(
    uninterrupted: tuple[list[dict[str, Any]], Recommender], tmp_path: Path
) -> None:
    lines, model = uninterrupted
    window = tiny.windows(2)[0]
    expected = tiny.model(condition="whiten").items
    fit_conditions(expected, tiny.features(), tiny.config().split(window).train_pairs[1])
    assert same_conditions(model.items, expected)
    assert lines != run(condition="none")[0] != run(condition="standardize")[0]
    for gib in (0, 1.0):
        assert run(store_gib=gib)[0] == lines
        assert run(tmp_path / str(gib), store_gib=gib)[0] == lines
        assert (tmp_path / str(gib) / "conditioned").exists() == (gib == 0)


@pytest.mark.parametrize("gib", [0, None])
@pytest.mark.parametrize("part", range(4))
def test_run_killed_at_any_event_has_the_same_results(
    uninterrupted: tuple[list[dict[str, Any]], Recommender], tmp_path: Path, part: int, gib: float | None
) -> None:
    lines, model = uninterrupted
    events: list[str] = []
    run(listener=lambda event, fields: events.append(event))
    after, seen = 1 + part * (len(events) - 1) // 3, 0

    def listener(event: str, fields: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, listener, store_gib=gib)
    # The location may change between.
    resumed, again = run(tmp_path, store_gib=None if gib == 0 and part % 2 else gib)
    assert resumed == lines
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_later_modality_is_fitted_when_two_items_have_it(tmp_path: Path) -> None:
    first, second, _ = (tiny.config().split(window).train_pairs[1] for window in tiny.windows())
    present = np.ones(tiny.NUM_ITEMS, dtype=bool)
    present[first] = False
    present[first[0]] = True
    assert present[second].sum() > 2
    generator = torch.Generator().manual_seed(0)
    hidden = {name: torch.randn(tiny.NUM_ITEMS, 3, dim, generator=generator) for name, dim in tiny.DIMS.items()}
    features = InMemoryFeatures(hidden, {"image": present})
    messages: list[Any] = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        if event == "warning" and "unconditioned" in fields["message"]:
            messages.append(fields["message"])
        if event == "window":
            messages.append(model.items.conditioned())

    model = tiny.model(condition="whiten")
    stream = Stream(tiny.windows(), features)
    lines = tiny.without_time(StreamingTrainer(model, stream, tiny.config(epochs=2), listener=listener).fit())
    assert messages == [
        "window 0 trains on unconditioned hidden states of image: fewer than 2 of its training items have them",
        ("text",),
        ("image", "text"),
        ("image", "text"),
    ]
    expected = tiny.model(condition="whiten").items
    fit_conditions(expected, features, first)
    assert expected.conditioned() == ("text",)
    fit_conditions(expected, features, second)
    assert same_conditions(model.items, expected)

    for moment in ((0, 1), (1, 0), (1, 1), (2, 0)):

        def dying(event: str, fields: dict[str, Any], moment: tuple[int, int] = moment) -> None:
            if event == "epoch" and (fields["window"], fields["epoch"]) == moment:
                raise Killed

        with pytest.raises(Killed):
            run(tmp_path, dying, source=features, windows=3, store_gib=0)
    assert run(tmp_path, source=features, windows=3, store_gib=0)[0] == lines


def test_items_of_an_update_are_conditioned_like_earlier_items(tmp_path: Path) -> None:
    first, second = tiny.windows(2)
    known = int(first.items.max()) + 1
    assert second.items.max() >= known
    whole = store_of(tmp_path / "whole", tiny.features())
    expected = StreamingTrainer(
        tiny.model(condition="whiten"), Stream([first, second], whole), tiny.config(epochs=2)
    ).fit()
    for gib in (None, 0):
        folder = tmp_path / str(gib)
        source = tiny.features()
        store = HiddenStateStore.create(folder / "store", whole.specs)
        append(store, source, np.arange(known))
        for window in (first, second):
            with StreamingTrainer(
                tiny.model(condition="whiten"),
                Stream([], store),
                tiny.config(epochs=2, store_gib=gib),
                folder=folder / "run",
            ) as trainer:
                trainer.step(window)
                lines = trainer.metrics
            if store.num_items == known:
                append(store, source, np.arange(known, tiny.NUM_ITEMS))
                store = HiddenStateStore.open(folder / "store")
        assert tiny.without_time(lines) == tiny.without_time(expected)
        loaded = Recommender.from_pretrained(folder / "run" / "model")
        assert loaded.items.conditioned() == NAMES


def test_conditioned_store_without_a_folder_is_temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        conditioned_store.ConditionedStore,
        "open",
        classmethod(lambda cls, folder, view: (opened.append(folder), view)[1]),
    )
    opened: list[Path] = []
    with StreamingTrainer(tiny.model(condition="whiten"), tiny.stream(), tiny.config(store_gib=0)) as trainer:
        trainer.step(tiny.windows()[0])
        trainer.step(tiny.windows()[1])
        assert len(opened) == 1, "rows are conditioned once"
        assert opened[0].is_dir()
    assert not opened[0].exists()


def test_fitted_statistics_are_written_once(tmp_path: Path) -> None:
    lines, _ = run(tmp_path)
    (file,) = (tmp_path / "checkpoints").glob("*.conditions")
    newest = max((tmp_path / "checkpoints").glob("*.ckpt"))
    payload = newest.read_bytes()
    assert file.name.encode() in payload
    assert b"conditioning" not in payload
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged"):
        run(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot read .*, which the run needs to resume"):
        run(tmp_path)
    file.write_bytes(content)
    assert run(tmp_path)[0] == lines


def test_best_epoch_keeps_the_conditioning_statistics(uninterrupted: tuple[list[dict[str, Any]], Recommender]) -> None:
    _, model = uninterrupted
    best = snapshot(model)
    assert not any("conditioning" in name for name in best)
    fresh = tiny.model(condition="whiten")
    fresh.items.conditioning.load_state_dict(model.items.conditioning.state_dict())
    restore_snapshot(fresh, best, counters=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_window_without_training_sequences_fits_nothing() -> None:
    _, model = run(k_core=10_000)
    assert model.items.conditioned() == ()
