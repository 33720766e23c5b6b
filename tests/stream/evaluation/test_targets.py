"""Targets of a window compared with loops: inputs, masks, groups, ranks."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.stream import tiny
from xsmoe.data import History, Window, WindowSplits
from xsmoe.stream import StreamConfig
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model
from xsmoe.stream.evaluation.seen_items import SeenItemHistory
from xsmoe.stream.evaluation.targets import Chunk, RankedTargets, rank_targets
from xsmoe.stream.evaluation.window_evaluation import evaluate_window

CPU = torch.device("cpu")
ITEMS = 9


def window(seed: int = 0, size: int = 90, users: int = 7, start: int = 0) -> Window:
    rng = np.random.default_rng(seed)
    return Window(0, rng.integers(0, users, size), rng.integers(0, ITEMS, size), start + np.arange(size))


def seen_items_of(*windows: Window, config: StreamConfig) -> SeenItemHistory:
    seen = SeenItemHistory()
    for one in windows:
        seen.add(config.split(one))
    return seen


def build(config: StreamConfig, seen: int = 14) -> tuple[RankedTargets, WindowSplits, History]:
    """Return the targets of a window whose users have seen some items before. User 6 is new."""
    tested = window()
    history = History()
    history.add(*(column[:seen] % 6 for column in (window(1).users, window(1).items)))
    splits = config.split(tested)
    return RankedTargets.build(splits.all_pairs, np.arange(ITEMS), history, config), splits, history


def expected(splits: WindowSplits, history: History, config: StreamConfig) -> list[dict[str, Any]]:
    """Return every target by a loop, the users' last targets first."""
    last, others = [], []
    users, items = splits.all_pairs
    for user in sorted(set(users.tolist())):
        taken = items[users == user].tolist()
        met = set(history.of(np.array([user]))[0].tolist())
        begin = max(0, len(taken) - config.max_inputs - 1)
        for place in range(begin + 1, len(taken)):
            target = {
                "user": user,
                "target": taken[place],
                "inputs": taken[max(0, place - config.max_inputs) : place],
                "seen": met,
                "masked": met | set(taken[:place]),
                "known": taken[place] in met,
                "repeated": taken[place] in met | set(taken[:place]),
            }
            (last if place == len(taken) - 1 else others).append(target)
    return last + (others if config.targets == "all" else [])


def rows(chunk: Chunk) -> list[dict[str, Any]]:
    task = chunk.task

    def row(values: np.ndarray, offsets: np.ndarray, place: int) -> list[int]:
        return values[offsets[place] : offsets[place + 1]].tolist()

    return [
        {
            "target": int(task.targets[place]),
            "inputs": row(task.inputs, task.offsets, place),
            "seen": set(row(*chunk.excluded("seen"), place)),
            "masked": set(row(*chunk.excluded("masked"), place)),
        }
        for place in range(len(task))
    ]


@pytest.mark.parametrize("chunk", [None, 4, 30])
@pytest.mark.parametrize("max_inputs", [3, 10, 40])
@pytest.mark.parametrize("targets", ["all", "last"])
def test_targets_equal_loops(targets: Any, max_inputs: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunk is not None:
        monkeypatch.setattr("xsmoe.stream.evaluation.targets.USERS_PER_CHUNK", chunk)
        monkeypatch.setattr("xsmoe.stream.evaluation.targets.SEEN_PER_CHUNK", chunk)
    config = StreamConfig(k_core=2, max_inputs=max_inputs, targets=targets, protocol="paper")
    found, splits, history = build(config)
    loop = expected(splits, history, config)
    assert len(found) == len(loop)
    assert (len(loop) > len(found.users) == 7) == (targets == "all")
    chunks = list(found.chunks())
    mine = [row for chunk in chunks for row in rows(chunk)]
    assert mine == [{name: target[name] for name in ("target", "inputs", "seen", "masked")} for target in loop]
    assert found.users[found.row].tolist() == [target["user"] for target in loop]
    assert found.items_to_find.tolist() == [target["target"] for target in loop]
    assert found.repeated.tolist() == [target["repeated"] for target in loop]
    assert found.known.tolist() == found.missed.tolist() == [target["known"] for target in loop]
    assert 0 < found.known.sum() < found.repeated.sum() < len(found)
    if chunk is not None:
        assert all(len(c.task) <= chunk and (len(c.task) == 1 or len(c.masked[0]) <= chunk) for c in chunks)
    # Last targets are in separate chunks.
    borders = np.cumsum([len(c.task) for c in chunks])
    assert len(found.users) in borders


def test_no_user_to_test() -> None:
    config = StreamConfig(k_core=1)
    nothing = np.empty(0, np.int64)
    found = RankedTargets.build((nothing, nothing), np.arange(3), History(), config)
    assert len(found) == 0
    assert list(found.chunks()) == []
    ranks = rank_targets(tiny.model(), tiny.features(), found, CPU)
    assert [len(ranks[scoring]) for scoring in ("seen", "masked")] == [0, 0]


def test_items_outside_the_candidates_are_rejected() -> None:
    pairs = np.zeros(2, np.int64), np.array([1, 5])
    with pytest.raises(ValueError, match="candidates lack item 5, which the window contains"):
        RankedTargets.build(pairs, np.arange(3), History(), StreamConfig())


@pytest.mark.parametrize("repeats", ["rank", "miss"])
def test_last_targets_have_the_ranks_of_a_separate_task(repeats: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsmoe.stream.evaluation.targets.USERS_PER_CHUNK", 3)
    monkeypatch.setattr("xsmoe.stream.evaluation.full_ranking.USERS_PER_CHUNK", 3)
    config = StreamConfig(k_core=2, targets="all", repeats=repeats)
    targets, splits, history = build(config)
    task = RankingTask.build(splits.test, np.arange(ITEMS), history, repeats)
    model, features = tiny.model(), tiny.features()
    encoded: list[int] = []
    model.items.register_forward_hook(lambda module, given, result: encoded.append(len(result)))
    ranks = rank_targets(model, features, targets, CPU)
    assert sum(encoded) == ITEMS, "each candidate is embedded once"
    assert model.training
    assert ranks["seen"][: len(task)].tolist() == rank_with_model(model, features, task, CPU).tolist()
    assert np.isinf(ranks["masked"]).tolist() == targets.missed.tolist()
    assert np.isinf(ranks["masked"]).any() == (repeats == "miss")


def test_ranks_under_both_masks_equal_a_loop() -> None:
    config = StreamConfig(k_core=2, max_inputs=4, targets="all")
    targets, splits, history = build(config)
    model, features = tiny.model(), tiny.features()
    ranks = rank_targets(model, features, targets, CPU)
    model.eval()
    differ = 0
    with torch.no_grad():
        items = model.items(features.hidden(np.arange(ITEMS)))
        for place, target in enumerate(expected(splits, history, config)):
            query = model.users(items[target["inputs"]], torch.tensor([0, len(target["inputs"])]))[-1]
            scores = (items @ query).tolist()
            mine = scores[target["target"]]
            for scoring in ("seen", "masked"):
                others = set(range(ITEMS)) - target[scoring] - {target["target"]}
                assert ranks[scoring][place] == 1 + sum(scores[item] > mine for item in others)
            differ += ranks["seen"][place] != ranks["masked"][place]
    assert differ > 10


def test_groups_and_users_of_a_test() -> None:
    """Every group has a target in this window. The expected values are computed by hand."""
    config = StreamConfig(k_core=1, train_fraction=0.5, max_inputs=10)
    first = Window(0, np.array([0, 0, 1, 1, 0, 1]), np.array([0, 1, 0, 1, 2, 2]), np.arange(6))
    second = Window(1, np.array([0, 0, 0, 0, 1, 1]), np.array([0, 3, 3, 2, 1, 0]), 10 + np.arange(6))
    seen = seen_items_of(first, config=config)
    assert seen.trained.tolist() == [0, 1]
    line = evaluate_window(tiny.model(), tiny.features(), config.split(second), seen, config)
    # User 0 has the targets 3 (new, cold), 3 again, and 2 (seen before, not trained on); user 1 has 0 (seen before).
    groups = line["groups"]["seen"]
    assert {name: found["model"]["targets"] for name, found in groups.items()} == {
        "all": 4,
        "new": 1,
        "repeats": 3,
        "cold": 3,
    }
    assert {name: found["model"]["users"] for name, found in groups.items()} == {
        "all": 2,
        "new": 1,
        "repeats": 2,
        "cold": 1,
    }
    assert (line["by_user"]["users"], line["by_user"]["targets"]) == ([0], [1])
    assert line["by_user"]["hits"]["model"] == [1], "four items are fewer than ten"
    assert (line["all"]["users"], line["cold"]["users"], line["targets"]) == (2, 1, "all")
    assert line["groups"]["seen"]["new"]["model"]["se"]["HR@10"] is None


def test_last_targets_alone_give_the_same_results() -> None:
    config = tiny.config(targets="last")
    first, second, _ = tiny.windows()
    seen = seen_items_of(first, config=config)
    splits = config.split(second)
    model, features = tiny.model(), tiny.features()
    lines = {
        targets: evaluate_window(model, features, splits, seen, tiny.config(targets=targets))
        for targets in ("last", "all")
    }
    for name in ("candidates", "all", "cold", "popularity", "lift"):
        assert lines["last"][name] == lines["all"][name]
    found = lines["last"]["groups"]["seen"]
    assert found["all"]["model"]["targets"] == found["all"]["model"]["users"] == lines["last"]["all"]["users"]
    assert found["all"]["model"]["HR@10"] == lines["last"]["all"]["HR@10"]
    assert found["all"]["model"]["se"]["HR@10"] == pytest.approx(lines["last"]["all"]["se"]["HR@10"])
    assert found["all"]["all_time"]["HR@10"] == lines["last"]["popularity"]["all_time"]["HR@10"]
    assert found["cold"]["model"]["NDCG@10"] == pytest.approx(lines["last"]["cold"]["NDCG@10"])
    assert lines["all"]["groups"]["seen"]["all"]["model"]["targets"] > 2 * lines["all"]["all"]["users"]
