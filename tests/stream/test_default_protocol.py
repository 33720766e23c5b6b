"""The default protocol compared with loops: targets, seen items, cold items, popularity, schedule, early stopping."""

from typing import Any

import numpy as np
import pytest

from tests.stream import tiny
from xsmoe.data import Window
from xsmoe.stream import StreamingTrainer, epoch, trainer
from xsmoe.stream.evaluation import window_evaluation
from xsmoe.stream.evaluation.baselines import places
from xsmoe.stream.evaluation.full_ranking import RankingTask
from xsmoe.stream.state.seeds import derive

K_CORE = 4
Pair = tuple[int, int]


def kept(window: Window) -> tuple[list[Pair], list[Pair]]:
    """Return the training and the validation part of a window after the k-core filter, by loops."""
    pairs = list(zip(window.users.tolist(), window.items.tolist(), strict=True))
    users = [user for user, _ in pairs]
    pairs = [pair for pair in pairs if users.count(pair[0]) >= K_CORE]
    cut = int(len(pairs) * 0.85)
    return pairs[:cut], pairs[cut:]


def last_items(pairs: list[Pair]) -> dict[int, list[int]]:
    """Return the users with two items or more, and their last eleven items."""
    users = sorted({user for user, _ in pairs})
    items = {user: [item for who, item in pairs if who == user] for user in users}
    return {user: taken[-11:] for user, taken in items.items() if len(taken) >= 2}


def check_task(task: RankingTask, sequences: dict[int, list[int]], seen: list[Pair], known: list[Pair]) -> None:
    assert task.candidates.tolist() == sorted({item for _, item in known})
    assert len(task) == len(sequences)
    for place, (user, items) in enumerate(sequences.items()):
        inputs = task.inputs[task.offsets[place] : task.offsets[place + 1]]
        assert task.candidates[inputs].tolist() == items[:-1]
        assert task.candidates[task.targets[place]] == items[-1]
        found = task.candidates[task.seen[task.seen_offsets[place] : task.seen_offsets[place + 1]]]
        assert set(found.tolist()) == {item for who, item in seen if who == user}
    assert not task.missed.any()


def popularity_hits(sequences: dict[int, list[int]], counted: list[Pair], seen: list[Pair], known: list[Pair]) -> float:
    counts = {item: 0 for _, item in known}
    for _, item in counted:
        counts[item] += 1
    # Items with equal counts have a fixed pseudorandom order.
    ids = np.array(sorted(counts))
    order = dict(zip(ids.tolist(), places(np.array([counts[item] for item in ids.tolist()]), ids), strict=True))
    assert all((order[a] < order[b]) >= (counts[a] < counts[b]) for a in counts for b in counts)
    hits = 0
    for user, items in sequences.items():
        met = {item for who, item in seen if who == user}
        others = [order[item] for item in counts if item not in met and item != items[-1]]
        hits += 1 + sum(place > order[items[-1]] for place in others) <= 10
    return hits / len(sequences)


def test_targets_seen_cold_and_popular_items_equal_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: dict[str, list[Any]] = {"validation": [], "test": []}
    for module, name, where in (
        (trainer, "rank_with_model", "validation"),
        (window_evaluation, "rank_targets", "test"),
    ):
        real = getattr(module, name)

        def record(model: Any, features: Any, task: Any, device: Any, where: str = where, real: Any = real) -> Any:
            tasks[where].append(task)
            return real(model, features, task, device)

        monkeypatch.setattr(module, name, record)
    windows = tiny.windows(4, users=30, each=13)
    settings = tiny.config(k_core=K_CORE, epochs=1, warmup_epochs=0)
    run = StreamingTrainer(tiny.model(), tiny.stream(4, users=30, each=13), settings)
    lines = [line for line in run.fit() if line["kind"] == "test"]

    parts = [kept(window) for window in windows]
    earlier: list[Pair] = []
    trained: set[int] = set()
    unmet: list[int] = []
    for number, (train, validation) in enumerate(parts):
        known = earlier + train + validation
        assert len(known) < len(earlier) + len(windows[number]), "the k-core must drop someone"
        if number:
            sequences = last_items(train + validation)
            # The last targets are first, in separate chunks.
            check_task(next(tasks["test"][number - 1].chunks()).task, sequences, earlier, known)
            line = lines[number - 1]
            cold = sum(items[-1] not in trained for items in sequences.values())
            assert line["cold"]["users"] == cold
            unmet.append(cold - sum(items[-1] not in {i for _, i in earlier} for items in sequences.values()))
            previous = parts[number - 1][0] + parts[number - 1][1]
            for name, counted in (("all_time", earlier), ("last_window", previous)):
                assert line["popularity"][name]["HR@10"] == popularity_hits(sequences, counted, earlier, known)
        check_task(tasks["validation"][number], last_items(validation), earlier + train, known)
        earlier = known
        trained |= {item for items in last_items(train).values() for item in items}
    assert max(unmet) > 0, "some target must have been met by others, but never trained on"
    assert lines[-1]["popularity"]["all_time"] != lines[-1]["popularity"]["last_window"]


def test_learning_rate_decays_to_its_minimum_and_restarts() -> None:
    settings = tiny.config(epochs=5, warmup_epochs=5, lr=0.02, lr_decay=0.5, min_lr=0.004)
    lines = StreamingTrainer(tiny.model(), tiny.stream(), settings).fit()
    rates = [line["lr"] for line in lines if line["kind"] == "epoch"]
    assert rates == pytest.approx([0.02, 0.01, 0.005, 0.004, 0.004] * 3)


@pytest.mark.parametrize(
    "ranks, patience, best, epochs",
    [([2, 2, 3, 1], 2, 1, 4), ([3, 2, 4, 5, 1], 4, 5, 6), ([5, 4, 3, 2, 1], 2, 5, 6), ([1, 2, 1, 1, 1], 2, 1, 4)],
)
def test_stops_after_patience_and_keeps_the_first_best(
    monkeypatch: pytest.MonkeyPatch, ranks: list[int], patience: int, best: int, epochs: int
) -> None:
    script = iter(ranks)
    monkeypatch.setattr(trainer, "rank_with_model", lambda m, f, task, d: np.full(len(task), float(next(script))))
    run = StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(epochs=6, warmup_epochs=1, patience=patience))
    line = run.step(tiny.windows()[0])
    assert (line["best_epoch"], line["epochs"]) == (best, epochs)


def test_each_window_has_a_fresh_optimizer_and_each_epoch_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    real, first, orders = epoch.train_step, [], []
    fresh = {"window": True}

    def step(model: Any, given: Any, optimizer: Any, *arguments: Any) -> Any:
        batch = given.batch
        if fresh.pop("window", False):
            first.append(len(optimizer.state))
        if fresh.pop("epoch", False):
            orders.append(tuple(batch.items[batch.inputs].tolist()))
        return real(model, given, optimizer, *arguments)

    def listener(event: str, fields: dict) -> None:
        if event == "begin":
            fresh["window"] = fresh["epoch"] = True
        if event == "epoch":
            fresh["epoch"] = True

    monkeypatch.setattr(epoch, "train_step", step)
    StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(), listener=listener).fit()
    assert first == [0, 0, 0]
    assert len(set(orders)) == len(orders) > 6


def test_seeds_depend_on_all_arguments() -> None:
    base = (0, 0, 0, "order")
    others = [(1, 0, 0, "order"), (0, 1, 0, "order"), (0, 0, 1, "order"), (0, 0, 0, "dropout"), (0, 0, 0, "growth")]
    seeds = [derive(*parts) for parts in [base, *others]]
    assert len(set(seeds)) == len(seeds)
    assert derive(*base) == seeds[0]
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_new_gates_and_dropout_differ_from_window_to_window(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []

    def record(seed: int, *parts: Any) -> int:
        drawn.append(parts)
        return derive(seed, *parts)

    monkeypatch.setattr("xsmoe.stream.epoch.derive", record)
    monkeypatch.setattr("xsmoe.stream.growth.derive", record)
    lines = StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(prune=False)).fit()
    epochs = [(line["window"], line["epoch"]) for line in lines if line["kind"] == "epoch"]
    assert [d[:2] for d in drawn if d[2] == "order"] == epochs
    assert [d[:2] for d in drawn if d[2] == "dropout"] == epochs
    assert [d[:2] for d in drawn if d[2] == "growth"] == [(1, 0), (2, 0)]
