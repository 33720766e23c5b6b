"""Baselines: decayed popularity, the choice of its half-life, and the user's own inputs."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.stream.evaluation.test_targets import CPU, ITEMS, build, rows, seen_items_of, window
from xsmoe.data import Window
from xsmoe.stream import StreamConfig
from xsmoe.stream.evaluation.baselines import (
    HALF_LIVES,
    choose_half_life,
    places,
    rank_baselines,
    rank_own_inputs,
    rank_with_scores,
)
from xsmoe.stream.evaluation.full_ranking import rank, rank_with_popularity
from xsmoe.stream.evaluation.seen_items import SeenItemHistory
from xsmoe.stream.evaluation.targets import SCORINGS, RankedTargets

INF = float("inf")


def test_decayed_popularity_by_hand() -> None:
    config = StreamConfig(k_core=1, train_fraction=0.5)
    zeros = np.zeros(4, np.int64)
    seen = seen_items_of(
        Window(0, zeros, np.array([0, 0, 1, 2]), np.array([0, 10, 20, 30])),
        Window(1, zeros, np.array([0, 3, 2, 2]), np.array([40, 50, 60, 70])),
        config=config,
    )
    items = np.array([0, 1, 2, 3, 8])
    (halved,) = seen.decayed(items, [10.0])
    assert halved.tolist() == [2**-7 + 2**-6 + 2**-3, 2**-5, 2**-4 + 2**-1 + 1, 2**-2, 0]
    before, everything = seen.decayed(items, [10.0, INF], before_validation=True)
    assert before.tolist() == [2**-5 + 2**-4 + 2**-1, 2**-3, 2**-2, 1, 0]
    assert everything.tolist() == [3, 1, 1, 1, 0]
    assert seen.decayed(items, [INF])[0].tolist() == seen.popularity(items)["all_time"].tolist()
    assert SeenItemHistory().decayed(items, [3.0])[0].tolist() == [0] * 5


def test_only_interactions_in_the_k_core_count() -> None:
    config = StreamConfig(k_core=2)
    seen = seen_items_of(
        Window(0, np.array([0, 1, 0]), np.array([0, 1, 2]), np.array([5, 6, 7])),
        config=config,
    )
    assert seen.decayed(np.arange(3), [1.0])[0].tolist() == [2**-2, 0, 1]


@pytest.mark.parametrize("repeats", ["rank", "miss"])
def test_global_scores_are_ranked_like_the_operator(repeats: Any) -> None:
    config = StreamConfig(k_core=2, repeats=repeats)
    targets, _, _ = build(config)
    scores = np.random.default_rng(0).integers(0, 4, ITEMS).astype(float)
    ranks = rank_with_scores({"a": scores, "b": -scores}, targets)
    expected = [rank_with_popularity(places(scores, np.arange(ITEMS)), chunk.task) for chunk in targets.chunks()]
    assert ranks["a"]["seen"].tolist() == np.concatenate(expected).tolist()
    assert ranks["a"]["masked"].tolist() != ranks["a"]["seen"].tolist()
    assert ranks["a"]["seen"].tolist() != ranks["b"]["seen"].tolist()


def test_places_ascend_with_scores_and_ties_do_not_follow_ids() -> None:
    rng = np.random.default_rng(0)
    items = np.sort(rng.permutation(5000)[:2000])
    scores = rng.integers(0, 3, 2000)
    found = places(scores, items)
    assert sorted(found.tolist()) == list(range(2000))
    assert (np.diff(scores[np.argsort(found)]) >= 0).all()
    for score in range(3):
        # With some 670 items the standard error is about 0.04.
        assert abs(np.corrcoef(items[scores == score], found[scores == score])[0, 1]) < 0.15
    # The order of items does not depend on the other items.
    few = places(np.zeros(50), items[:50])
    assert (np.argsort(few) == [place for place in np.argsort(places(np.zeros(2000), items)) if place < 50]).all()


@pytest.mark.parametrize("size", [40, 100])
def test_uniform_popularity_equals_chance(size: int) -> None:
    """Every item is equally frequent in every window, and each window has one timestamp. All scores are equal."""
    config = StreamConfig(k_core=2)
    rng = np.random.default_rng(0)
    windows = []
    for number in range(2):
        items, users = (rng.permutation(np.arange(12 * size) % bound) for bound in (size, 120))
        windows.append(Window(0, users, items, np.full(len(items), 1000 * number)))
    seen = seen_items_of(windows[0], config=config)
    assert len(set(seen.popularity(np.arange(size))["all_time"].tolist())) == 1
    splits = config.split(windows[1])
    targets = RankedTargets.build(splits.all_pairs, seen.known_with(splits), seen.history, config)
    ranks = rank_baselines(targets, seen, choose_half_life(seen, config).seconds)
    left = [size - len(row["masked"]) for chunk in targets.chunks() for row in rows(chunk)]
    chance = np.minimum(1, 10 / np.maximum(1, left))[~targets.repeated].mean()
    for name in ("all_time", "last_window", "decayed"):
        hits = (ranks[name]["masked"] <= 10)[~targets.repeated]
        assert len(hits) > 250
        assert hits.mean() == pytest.approx(chance, abs=0.1)


def test_scores_too_close_for_float32_are_ordered() -> None:
    targets, _, _ = build(StreamConfig(k_core=2), seen=0)
    scores = 1 + np.arange(ITEMS) * 1e-12
    tiny_ones = np.exp2(-200.0 - np.arange(ITEMS)[::-1])
    plain = np.arange(ITEMS, dtype=float)
    ranks = rank_with_scores({"close": scores, "tiny": tiny_ones, "plain": plain}, targets, ("masked",))
    assert ranks["close"]["masked"].tolist() == ranks["tiny"]["masked"].tolist() == ranks["plain"]["masked"].tolist()


@pytest.mark.parametrize("max_inputs", [2, 10])
def test_own_inputs_are_ranked_like_the_operator_on_one_hot_vectors(
    max_inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xsmoe.stream.evaluation.targets.USERS_PER_CHUNK", 5)
    targets, _, _ = build(StreamConfig(k_core=2, max_inputs=max_inputs))
    found = rank_own_inputs(targets)
    for scoring in SCORINGS:
        expected = []
        for chunk in targets.chunks():
            queries = torch.zeros(len(chunk.task), ITEMS)
            for row in range(len(chunk.task)):
                begin, end = chunk.task.offsets[row : row + 2]
                for recency, item in enumerate(chunk.task.inputs[begin:end].tolist(), start=1):
                    queries[row, item] = recency
            expected.append(rank(queries, torch.eye(ITEMS), chunk.task.targets, chunk.excluded(scoring), CPU))
        assert found[scoring].tolist() == torch.cat(expected).tolist()
    assert found["seen"].tolist() != found["masked"].tolist()
    assert len(set(found["seen"].tolist())) > 3


def slow_hits(targets: RankedTargets, weights: np.ndarray) -> tuple[float, float]:
    """Return HR@10 and MRR on new targets, masked, by loops."""
    hits, reciprocal = [], []
    place = 0
    for chunk in targets.chunks():
        values, offsets = chunk.masked
        for row, target in enumerate(chunk.task.targets.tolist()):
            if not targets.repeated[place]:
                left_out = set(values[offsets[row] : offsets[row + 1]].tolist()) | {target}
                others = [weights[item] for item in range(len(weights)) if item not in left_out]
                mine = weights[target]
                equal = sum(other == mine for other in others)
                found = 1 + sum(other > mine for other in others) + -(-equal // 2)
                hits.append(found <= 10)
                reciprocal.append(1 / found)
            place += 1
    return float(np.mean(hits)), float(np.mean(reciprocal))


def drifting(seed: int, items: int, size: int = 240, moving: bool = True) -> Window:
    """Return windows in which the popularity of items changes over time, or is constant."""
    rng = np.random.default_rng(seed)
    centre = np.arange(size) * (items / size) if moving else np.full(size, items / 2)
    taken = (centre + rng.normal(0, 3 if moving else 12, size)).astype(np.int64) % items
    return Window(0, rng.integers(0, 12, size), taken, 1000 * seed + np.arange(size) * 3)


@pytest.mark.parametrize("moving", [True, False])
def test_the_half_life_is_the_best_on_validation(moving: bool) -> None:
    config = StreamConfig(k_core=1)
    windows = [drifting(seed, 60, moving=moving) for seed in range(2)]
    seen = seen_items_of(*windows, config=config)
    chosen = choose_half_life(seen, config)
    splits = config.split(windows[1])
    before = SeenItemHistory()
    before.add(config.split(windows[0]))
    before.add_training(splits)
    targets = RankedTargets.build(splits.validation_pairs, before.known, before.history, config)
    train = len(splits.train_pairs[0])
    taken = np.concatenate([config.split(windows[0]).all_pairs[1], splits.train_pairs[1]])
    times = np.concatenate([windows[0].timestamps, windows[1].timestamps[:train]])
    quality = []
    for multiple in HALF_LIVES:
        ages = (times.max() - times) / (multiple * (240 - 1) * 3)
        weights = np.bincount(taken, weights=0.5**ages, minlength=int(targets.candidates.max()) + 1)
        quality.append(slow_hits(targets, places(weights[targets.candidates], targets.candidates)))
    best = max(range(len(HALF_LIVES)), key=lambda place: (*quality[place], place))
    assert chosen.windows == HALF_LIVES[best]
    assert chosen.seconds == HALF_LIVES[best] * (240 - 1) * 3
    assert chosen.targets == int((~targets.repeated).sum()) > 5
    assert len(set(quality)) > 2
    assert (chosen.windows <= 1 / 4) == moving


def test_without_validation_the_half_life_is_infinite() -> None:
    config = StreamConfig(k_core=1)
    assert choose_half_life(SeenItemHistory(), config).to_dict() == {"seconds": None, "windows": None, "targets": 0}
    lone = seen_items_of(Window(0, np.zeros(3, np.int64), np.arange(3), np.arange(3)), config=config)
    assert choose_half_life(lone, config).seconds == INF


def test_window_with_one_timestamp_has_a_positive_half_life() -> None:
    config = StreamConfig(k_core=1, train_fraction=0.5)
    moment = Window(0, np.arange(60) % 5, np.arange(60) % 11, np.full(60, 7))
    chosen = choose_half_life(seen_items_of(moment, config=config), config)
    assert chosen.targets == 0 or chosen.seconds > 0


def test_rebuilt_history_gives_the_same_baselines() -> None:
    config = StreamConfig(k_core=2)
    windows = [window(seed, start=1000 * seed) for seed in range(3)]
    grown, rebuilt = SeenItemHistory(), seen_items_of(*windows, config=config)
    for one in windows:
        splits = config.split(one)
        grown.add_training(splits)
        grown.add_validation(splits)
    targets, _, _ = build(config)
    found = []
    for seen in (grown, rebuilt):
        half_life = choose_half_life(seen, config)
        found.append((half_life, rank_baselines(targets, seen, half_life.seconds)))
    assert found[0][0] == found[1][0]
    for name, ranks in found[0][1].items():
        for scoring in SCORINGS:
            assert ranks[scoring].tolist() == found[1][1][name][scoring].tolist()
