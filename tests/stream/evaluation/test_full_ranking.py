"""The ranking task against loops over users, and the metrics."""

import numpy as np
import pytest
import torch

from bench.paper.protocol import hit_ratio, ndcg, target_rank
from tests.stream import tiny
from xsmoe.data import History, Sequences, split_window
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model, rank_with_popularity
from xsmoe.stream.evaluation.metrics import clustered_error, per_user, pool, summarize, summarize_targets


def setting() -> tuple[Sequences, np.ndarray, History]:
    first, second, _ = tiny.windows()
    history = History()
    history.add(first.users, first.items)
    splits = split_window(second, k_core=2)
    return splits.test, np.union1d(first.items, second.items), history


def test_task_equals_loops() -> None:
    sequences, candidates, history = setting()
    task = RankingTask.build(sequences, candidates, history, "miss")
    assert len(task) == len(sequences) > 5
    for user in range(len(task)):
        own = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
        met, _ = history.of(sequences.users[user : user + 1])
        assert candidates[task.inputs[task.offsets[user] : task.offsets[user + 1]]].tolist() == own[:-1].tolist()
        assert candidates[task.targets[user]] == own[-1]
        seen = candidates[task.seen[task.seen_offsets[user] : task.seen_offsets[user + 1]]]
        assert sorted(seen.tolist()) == sorted(set(met.tolist()) & set(candidates.tolist()))
        assert task.missed[user] == (own[-1] in met)
    assert 0 < task.missed.sum() < len(task)
    assert not RankingTask.build(sequences, candidates, history, "rank").missed.any()
    part = task.chunk(2, 5)
    assert part.inputs.tolist() == task.inputs[task.offsets[2] : task.offsets[5]].tolist()
    assert part.seen.tolist() == task.seen[task.seen_offsets[2] : task.seen_offsets[5]].tolist()
    assert (len(part), part.offsets[0], part.seen_offsets[0]) == (3, 0, 0)


def test_sequence_outside_the_candidates_is_rejected() -> None:
    sequences, candidates, history = setting()
    with pytest.raises(ValueError, match=f"candidates lack item {sequences.items[0]}"):
        RankingTask.build(sequences, candidates[candidates != sequences.items[0]], history, "rank")


@pytest.mark.parametrize("repeats", ["rank", "miss"])
def test_model_ranks_equal_the_published_evaluation(repeats: str, monkeypatch) -> None:
    monkeypatch.setattr("xsmoe.stream.evaluation.full_ranking.USERS_PER_CHUNK", 3)
    monkeypatch.setattr("xsmoe.stream.evaluation.full_ranking.ITEMS_PER_CHUNK", 7)
    sequences, candidates, history = setting()
    features, model = tiny.features(), tiny.model()
    task = RankingTask.build(sequences, candidates, history, repeats)
    ranks = rank_with_model(model, features, task, torch.device("cpu"))
    assert model.training
    model.eval()
    with torch.no_grad():
        items = model.items(features.hidden(np.arange(tiny.NUM_ITEMS)))
        for user in range(len(task)):
            own = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
            query = model.users(items[own[:-1]], torch.tensor([0, len(own) - 1]))[-1]
            scores = torch.full((tiny.NUM_ITEMS,), -torch.inf)
            scores[candidates] = items[candidates] @ query
            met, _ = history.of(sequences.users[user : user + 1])
            met = met if repeats == "miss" else met[met != own[-1]]
            assert ranks[user] == target_rank(scores, int(own[-1]), met.tolist())


def test_popularity_is_ranked_with_ties_in_the_middle() -> None:
    candidates = np.arange(5, dtype=np.int64)
    sequences = Sequences(np.array([0]), np.array([4, 2]), np.array([0, 2]))
    task = RankingTask.build(sequences, candidates, History(), "rank")
    assert rank_with_popularity(np.array([5.0, 3, 3, 3, 1]), task).tolist() == [3.0]


def test_metrics_by_hand_and_as_published() -> None:
    ranks = np.array([1, 3, 10, 11, 20, 21, np.inf])
    values = per_user(ranks)
    for cutoff in (10, 20):
        assert values[f"HR@{cutoff}"].mean() == pytest.approx(hit_ratio(ranks.tolist(), cutoff))
        assert values[f"NDCG@{cutoff}"].mean() == pytest.approx(ndcg(ranks.tolist(), cutoff))
    assert values["MRR"].tolist() == pytest.approx([1, 1 / 3, 0.1, 1 / 11, 1 / 20, 1 / 21, 0])
    summary = summarize(values)
    assert summary["users"] == 7
    assert summary["se"]["HR@10"] == pytest.approx(np.std([1, 1, 1, 0, 0, 0, 0], ddof=1) / 7**0.5)


def test_pooling_weights_users_equally() -> None:
    rng = np.random.default_rng(0)
    parts = [{"HR@10": rng.random(size)} for size in (30, 50, 0, 1)]
    pooled = pool([summarize(part) for part in parts])
    assert pooled["users"] == 81
    assert pooled["HR@10"] == pytest.approx(np.concatenate([p["HR@10"] for p in parts]).mean())
    variance = sum(len(p["HR@10"]) * p["HR@10"].var(ddof=1) for p in parts[:2]) / 81**2
    assert pooled["se"]["HR@10"] == pytest.approx(variance**0.5)
    assert pool([]) == {"users": 0, "se": {}}


def test_clustered_error_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 9, 60) * 7
    values = rng.random(60)
    summary = summarize_targets({"HR@10": values}, users)
    mean = sum(values) / 60
    pairs = list(zip(values, users, strict=True))
    totals = [sum(value - mean for value, owner in pairs if owner == user) for user in set(users)]
    expected = (len(totals) / (len(totals) - 1) * sum(total**2 for total in totals)) ** 0.5 / 60
    assert (summary["targets"], summary["users"]) == (60, len(totals))
    assert summary["HR@10"] == pytest.approx(mean)
    assert summary["se"]["HR@10"] == pytest.approx(expected)
    assert summary["se"]["HR@10"] != pytest.approx(np.std(values, ddof=1) / 60**0.5, rel=0.01)


def test_error_with_one_target_per_user_is_the_plain_error() -> None:
    values = np.random.default_rng(1).random(30)
    plain, clustered = summarize({"MRR": values}), summarize_targets({"MRR": values}, np.arange(30)[::-1])
    assert clustered["se"]["MRR"] == pytest.approx(plain["se"]["MRR"])


def test_users_who_agree_have_an_error_of_exactly_zero() -> None:
    counts = np.array([3, 7, 11, 1])
    assert clustered_error(counts, counts) == 0
    assert clustered_error(0 * counts, counts) == 0
    assert clustered_error(np.array([3]), np.array([7])) is None
    nobody = {"targets": 0, "users": 0, "MRR": None, "se": {"MRR": None}}
    assert summarize_targets({"MRR": np.empty(0)}, np.empty(0, np.int64)) == nobody


def test_pooling_weights_targets_equally() -> None:
    parts = [summarize_targets({"HR@10": np.array(v)}, np.arange(len(v)) // 2) for v in ([1.0, 0, 1, 1], [0.0, 1], [])]
    pooled = pool(parts, weight="targets")
    assert (pooled["targets"], pooled["HR@10"]) == (6, pytest.approx(4 / 6))
    assert set(pooled) == {"targets", "HR@10", "se"}
