"""Item IDs in a run: dropout, padding, graphed steps, growth, resuming and ranking."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.core.memory import allocations
from tests.fakes import CPU, FailingCapture, FakeCapture
from tests.stream import tiny
from tests.stream.cuda.graph_runs import Window, assert_same
from tests.stream.tiny import Killed
from xsmoe.nn import LazyAdam, Recommender, XSMoE, lazy_adam
from xsmoe.stream import Stream, StreamingTrainer
from xsmoe.stream import epoch as epochs
from xsmoe.stream.batches.builder import IdDropout, StepInput
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.batches.prefetch import map_ahead
from xsmoe.stream.epoch import load_optimizer, make_optimizer, train_step
from xsmoe.stream.evaluation.full_ranking import embed_items
from xsmoe.stream.growth import grow_ids
from xsmoe.stream.precision import LossScaler, steps_taken
from xsmoe.stream.state.checkpoints import Checkpoints
from xsmoe.stream.state.run_folder import read_metrics

ITEMS = np.arange(4000)


def left_out(items: np.ndarray = ITEMS, step: int = 0, **changed: Any) -> np.ndarray:
    dropout = IdDropout(**{"share": 0.25, "seed": 0, "window": 0, "epoch": 0, **changed})
    return dropout(items, step) < 0


def test_ids_of_a_share_of_the_items_are_omitted() -> None:
    for share in (0.0, 0.1, 0.25, 0.9, 1.0):
        out = np.stack([left_out(step=step, share=share) for step in range(20)])
        assert out.mean() == pytest.approx(share, abs=0.01)
        # Every item is omitted sometimes, and none always.
        assert out.mean(0).std() == pytest.approx((share * (1 - share) / 20) ** 0.5, abs=0.01)
    ids = IdDropout(0.25, 0, 0, 0)(ITEMS, 3)
    assert ids.dtype == np.int64
    assert set(np.unique(ids - ITEMS)[-1:]) == {0}
    assert (ids[ids < 0] == -1).all()


def test_draw_depends_only_on_seed_window_epoch_step_and_item() -> None:
    out = left_out()
    some = np.random.default_rng(0).permutation(4000)[:100]
    assert (left_out(some) == out[some]).all()
    assert (left_out(some[:1]) == out[some[:1]]).all()
    for change in ({"step": 1}, {"seed": 1}, {"window": 1}, {"epoch": 1}):
        other = left_out(**change)
        # Independent draws are equal for 0.75^2 + 0.25^2 of all items.
        assert (other == out).mean() == pytest.approx(0.625, abs=0.03), change
    assert left_out(np.array([], dtype=np.int64)).shape == (0,)


def test_draws_do_not_depend_on_the_thread_that_builds_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {"here": [], "thread": []}

    class Built(StepInput):
        @classmethod
        def build(cls, *arguments: Any) -> StepInput:
            made = StepInput.build(*arguments)
            assert made.batch.ids is not None
            seen[where].append(made.batch.ids)
            return made

    monkeypatch.setattr(epochs, "StepInput", Built)
    for where in seen:
        if where == "thread":
            monkeypatch.setattr(epochs, "prefetch", lambda build, chosen, device: map_ahead(build, chosen))
        window = with_ids(FailingCapture())
        window.epoch()
        assert any((ids < 0).any() for ids in seen[where])
    assert all(map(torch.equal, seen["here"], seen["thread"]))


def model(seed: int = 0) -> Recommender:
    made = tiny.model(seed, ids=True)
    made.items.grow_ids(tiny.NUM_ITEMS)
    return made


def with_ids(*arguments: Any, **options: Any) -> Window:
    window = Window(*arguments, **options)
    window.model = model()
    window.begin()
    return window


@pytest.mark.parametrize("static", [False, True], ids=["host", "in place"])
def test_replayed_steps_have_the_same_results(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if static:
        monkeypatch.setattr(lazy_adam, "_summed", lazy_adam._summed_in_place)
    replayed, eager = with_ids(FakeCapture()), with_ids(FailingCapture())
    for number in range(3):
        assert replayed.epoch(number) == eager.epoch(number)
        assert_same(replayed, eager)
    assert len(replayed.graphs) > 0
    table = replayed.model.items.ids.weight  # type: ignore[union-attr]
    counts = replayed.optimizer.state[table]["step"]
    assert counts.shape == (tiny.NUM_ITEMS,)
    assert 0 < counts.max() <= steps_taken(replayed.optimizer)
    trained = counts > 0
    assert table[trained].any(1).all()
    assert not table[~trained].any()


def test_skipped_steps_are_counted_with_ids() -> None:
    scaler = LossScaler(CPU)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 3e38})
    window = with_ids(FailingCapture(), scaler=scaler)
    before = [one.detach().clone() for one in window.model.parameters()]
    done = epochs.train_epoch(
        window.model, window.features, window.splits.train.take(np.arange(3)), window.log_share, window.optimizer,
        window.config, scaler, window=0, epoch=0, on_batch=lambda done, of: None,
    )  # fmt: skip
    assert done["skipped_steps"] == done["steps"] == 1
    assert all(map(torch.equal, before, window.model.parameters()))


def test_a_padded_batch_trains_the_same_rows() -> None:
    results = []
    for capacity in (None, Capacity(5, 10)):
        trained = model()
        for module in trained.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        optimizer = make_optimizer(trained, tiny.config())
        given = input_of(np.array([0, 1, 2]), capacity)
        for _ in range(3):
            train_step(trained, given, optimizer, tiny.config())
        table = trained.items.ids.weight  # type: ignore[union-attr]
        results.append((table.detach(), optimizer.state[table]["step"]))
    (plain, plain_steps), (padded, padded_steps) = results
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(padded_steps, plain_steps)
    assert padded_steps.nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7]


def input_of(users: np.ndarray, capacity: Capacity | None) -> StepInput:
    """Return the input of these users, without the ID of item 4."""
    log_share = np.log(np.arange(1, tiny.NUM_ITEMS + 1) / 100)
    sequences = tiny.sequences().take(users)

    def ids(items: np.ndarray) -> np.ndarray:
        return np.where(items == 4, -1, items)

    given = StepInput.build(tiny.features(), tuple(tiny.DIMS), sequences, log_share, torch.float32, capacity, ids)
    assert given.batch.ids is not None
    assert given.batch.ids.tolist()[:6] == [0, 1, 2, 3, -1, 6]
    assert (given.batch.ids[7:] == -1).all()
    return given


def test_a_step_allocates_nothing_of_the_tables_size() -> None:
    trained, rows = model(), 100_000
    trained.items.grow_ids(rows)
    optimizer, given = make_optimizer(trained, tiny.config()), input_of(np.array([0, 1, 2]), None)

    def step() -> None:
        train_step(trained, given, optimizer, tiny.config())

    step()
    assert 0 < max(allocations(step)) < rows


def test_items_without_a_row_are_ranked_by_content() -> None:
    trained, features, items = model(), tiny.features(), np.array([0, 3, 20, 39])
    table = trained.items.ids
    assert table is not None
    content = embed_items(trained, features, items, CPU)
    torch.nn.init.normal_(table.weight)
    both = embed_items(trained, features, items, CPU)
    torch.testing.assert_close(both - content, table.weight.detach()[items])
    table.weight = torch.nn.Parameter(table.weight.detach()[:20])
    partly = embed_items(trained, features, items, CPU)
    assert torch.equal(partly[:2], both[:2])
    assert torch.equal(partly[2:], content[2:])
    assert embed_items(trained, features, items[:0], CPU).shape == (0, 8)


def test_chunks_of_items_keep_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, items = model(), np.arange(0, 40, 3)
    torch.nn.init.normal_(trained.items.ids.weight)  # type: ignore[union-attr]
    expected = embed_items(trained, tiny.features(), items, CPU)
    monkeypatch.setattr("xsmoe.stream.evaluation.full_ranking.ITEMS_PER_CHUNK", 4)
    torch.testing.assert_close(embed_items(trained, tiny.features(), items, CPU), expected)


def fit(folder: Path | None = None, listener: Any = None, **options: Any) -> tuple[list[dict], Recommender]:
    trained = tiny.model(ids=True)
    settings = tiny.config(**options)
    with StreamingTrainer(trained, tiny.stream(), settings, folder=folder, listener=listener) as trainer:
        return trainer.fit(), trained


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[list[dict], Recommender]:
    return fit()


def test_a_run_trains_the_ids_of_the_items_that_it_has_seen(uninterrupted) -> None:
    lines, trained = uninterrupted
    table = trained.items.ids.weight
    assert table.shape == (tiny.NUM_ITEMS, 8)
    config = tiny.config()
    seen = np.unique(np.concatenate([config.split(window).train.items for window in tiny.windows()]))
    assert table.any(1).nonzero().flatten().tolist() == seen.tolist()
    assert len(seen) < tiny.NUM_ITEMS
    without = fit(id_dropout=1.0)[1]
    assert not without.items.ids.weight.any()  # type: ignore[union-attr]
    window = next(line for line in lines if line["kind"] == "window")
    assert window["parameters"]["trainable"] == sum(
        p.numel()
        for p in [*tiny.model().parameters(), *model().items.ids.parameters()]  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("after", [3, 9, 14, 21, 30])
def test_run_killed_at_any_event_has_the_same_results(uninterrupted, tmp_path: Path, after: int) -> None:
    lines, trained = uninterrupted
    seen = []

    def listener(event: str, fields: dict) -> None:
        seen.append(event)
        if len(seen) == after:
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path, listener)
    resumed, again = fit(tmp_path)
    assert tiny.without_time(resumed) == tiny.without_time(lines)
    assert tiny.without_time(read_metrics(tmp_path)) == tiny.without_time(lines)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    exported = Recommender.from_pretrained(tmp_path / "model")
    assert torch.equal(exported.items.ids.weight, trained.items.ids.weight)  # type: ignore[union-attr]


def test_the_table_grows_with_the_features_and_keeps_its_rows(tmp_path: Path) -> None:
    windows = tiny.windows()
    few = max(int(window.items.max()) for window in windows[:2]) + 1
    whole = tiny.features()
    short = type(whole)({name: torch.stack(whole.hidden(np.arange(few), [name])[name], 1) for name in tiny.DIMS})
    assert few < tiny.NUM_ITEMS
    trained = tiny.model(ids=True)
    with StreamingTrainer(trained, Stream(windows[:2], short), tiny.config(), folder=tmp_path) as trainer:
        trainer.fit()
    assert trained.items.ids.weight.shape[0] == few  # type: ignore[union-attr]
    again = tiny.model(ids=True)
    with StreamingTrainer(again, Stream(windows, whole), tiny.config(), folder=tmp_path) as trainer:
        assert torch.equal(again.items.ids.weight, trained.items.ids.weight)  # type: ignore[union-attr]
        trainer.fit()
    assert again.items.ids.weight.shape[0] == tiny.NUM_ITEMS  # type: ignore[union-attr]
    # A table with its final size from the start has the same results, because missing rows count as zeros.
    expected = fit()[1]
    for name, value in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_only_models_with_ids_have_a_table_to_grow() -> None:
    items = XSMoE(("text",), dim=6, rank=2, out_dim=4)
    grow_ids(items, 5)
    assert items.ids is None
    longer = model().items
    grow_ids(longer, 3)
    assert longer.ids is not None
    assert longer.ids.num_items == tiny.NUM_ITEMS


def test_state_of_every_row_is_restored_from_a_checkpoint() -> None:
    given = input_of(np.array([0, 1, 2]), None)
    trained, optimizers = model(), []
    for _ in range(2):
        optimizer = make_optimizer(trained, tiny.config())
        assert isinstance(optimizer, LazyAdam)
        if optimizers:
            load_optimizer(optimizer, optimizers[0].state_dict())
        optimizers.append(optimizer)
        train_step(trained, given, optimizer, tiny.config())
    counts = optimizers[1].state[trained.items.ids.weight]["step"]  # type: ignore[union-attr]
    assert counts[[0, 4, 6]].tolist() == [2, 0, 2]


def test_a_checkpoint_is_not_copied_in_memory(tmp_path: Path) -> None:
    checkpoints, table = Checkpoints(tmp_path), torch.arange(1 << 20)
    tracemalloc.start()
    checkpoints.save({"table": table})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.nbytes < peak < 1.5 * table.nbytes
    found = checkpoints.load_newest(pytest.fail)
    assert found is not None
    assert torch.equal(found[1]["table"], table)


def test_batch_with_other_ids_needs_another_graph() -> None:
    given = input_of(np.array([0, 1, 2]), Capacity(5, 10))
    assert given.graph_key() != replace(given, batch=replace(given.batch, ids=None)).graph_key()
