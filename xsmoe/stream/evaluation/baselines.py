"""Baselines for the ranking task of a model: three kinds of popularity, and the user's own inputs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from xsmoe.data import ragged
from xsmoe.data.ragged import Ragged
from xsmoe.data.splitmix import GOLDEN, mix
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank
from xsmoe.stream.evaluation.metrics import per_user
from xsmoe.stream.evaluation.seen_items import SeenItemHistory
from xsmoe.stream.evaluation.targets import SCORINGS, RankedTargets, Ranks, with_misses

BASELINES = ("all_time", "last_window", "decayed", "own_inputs")
HALF_LIVES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, float("inf"))
"""Candidate half-lives, in durations of the last window."""


class HalfLife(NamedTuple):
    """Half-life of decayed popularity.

    Attributes:
        seconds: age at which an interaction has half the weight; infinite if no finite half-life was better.
        windows: the same in durations of the last window.
        targets: number of validation targets for the choice.
    """

    seconds: float
    windows: float
    targets: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the values as plain JSON values, with None for infinity."""
        seconds, windows = (None if value == float("inf") else value for value in (self.seconds, self.windows))
        return {"seconds": seconds, "windows": windows, "targets": self.targets}


def choose_half_life(seen: SeenItemHistory, config: StreamConfig) -> HalfLife:
    """Choose the half-life of decayed popularity on the last window's validation split.

    The criterion is HR@10 on targets that are new to their user, masked; then MRR, then the longer half-life. Only
    interactions of the training splits and of earlier windows are counted. Without new targets it is infinite.
    """
    part = seen.validation
    if part is None:
        return HalfLife(float("inf"), float("inf"), 0)
    targets = RankedTargets.build(part.pairs, seen.known, part.history, config)
    new = ~targets.repeated
    if not new.any():
        return HalfLife(float("inf"), float("inf"), 0)
    seconds = [windows * part.seconds for windows in HALF_LIVES]
    counted = seen.decayed(targets.candidates, seconds, before_validation=True)
    scores = {str(place): values for place, values in enumerate(counted)}
    found = rank_with_scores(scores, targets, ("masked",))

    def quality(place: int) -> tuple[float, float, int]:
        values = per_user(found[str(place)]["masked"][new])
        return float(values["HR@10"].mean()), float(values["MRR"].mean()), place

    best = max(range(len(HALF_LIVES)), key=quality)
    return HalfLife(seconds[best], HALF_LIVES[best], int(new.sum()))


def rank_baselines(targets: RankedTargets, seen: SeenItemHistory, half_life: float) -> dict[str, Ranks]:
    """Rank every target with every baseline of `BASELINES`, under both scorings.

    Args:
        targets: the targets.
        seen: seen items before the window of the targets.
        half_life: half-life of decayed popularity, in seconds.
    """
    scores = seen.popularity(targets.candidates)
    (scores["decayed"],) = seen.decayed(targets.candidates, [half_life])
    return {**rank_with_scores(scores, targets), "own_inputs": rank_own_inputs(targets)}


def rank_with_scores(
    scores: Mapping[str, np.ndarray], targets: RankedTargets, scorings: Sequence[str] = SCORINGS
) -> dict[str, Ranks]:
    """Rank every target with scores (C,) that are the same for all users, by the operator that models use.

    Items with equal scores have a fixed pseudorandom order. The operator alone would give each of them the middle
    rank. If all items were equally popular, that would find nothing and be weaker than chance.
    """
    cpu = torch.device("cpu")
    # float32 cannot distinguish very old interactions from none. Only the order of the scores matters.
    columns = {
        name: torch.from_numpy(places(values, targets.candidates)).float()[:, None] for name, values in scores.items()
    }
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {scoring: [] for scoring in scorings} for name in columns}
    for chunk in targets.chunks():
        queries = torch.ones(len(chunk.task), 1)
        for name, column in columns.items():
            for scoring in scorings:
                ranks = rank(queries, column, chunk.task.targets, chunk.excluded(scoring), cpu)
                found[name][scoring].append(ranks.numpy())
    return {name: _joined(parts, targets) for name, parts in found.items()}


def places(scores: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return the positions (C,) int64 of items, ids (C,), by ascending score (C,). A hash of the id breaks ties."""
    found = np.empty(len(items), np.int64)
    # Without the increment item 0 would always hash to 0.
    found[np.lexsort((mix(items.astype(np.uint64) + GOLDEN), scores))] = np.arange(len(items))
    return found


def rank_own_inputs(targets: RankedTargets) -> Ranks:
    """Rank every target when the user's inputs of the window are recommended again, the latest first.

    All other items have the same score, below the inputs. Ranks are counted; they equal those of `rank_of_target` for
    one-hot item vectors.
    """
    found: dict[str, list[np.ndarray]] = {scoring: [] for scoring in SCORINGS}
    for chunk in targets.chunks():
        for scoring, parts in found.items():
            parts.append(_count_own_inputs(chunk.task, chunk.excluded(scoring)))
    return _joined(found, targets)


def _count_own_inputs(task: RankingTask, excluded: Ragged) -> np.ndarray:
    size, rows = len(task.candidates), len(task)
    goals = np.arange(rows) * size + task.targets
    # `np.unique` finds the first of equal values, which must be the latest input.
    inputs = (ragged.row_of(task.offsets) * size + task.inputs)[::-1]
    inputs, place = np.unique(inputs, return_index=True)
    recency = len(task.inputs) - 1 - place
    found = ragged.find(inputs, goals)
    own = np.full(rows, -1)
    own[found >= 0] = recency[found[found >= 0]]

    seen = np.unique(ragged.row_of(excluded[1]) * size + excluded[0])
    seen = seen[ragged.find(goals, seen) < 0]
    others = (ragged.find(seen, inputs) < 0) & (ragged.find(goals, inputs) < 0)
    row = inputs // size
    higher = np.bincount(row[others & (recency > own[row])], minlength=rows)
    rest = size - 1 - np.bincount(seen // size, minlength=rows) - np.bincount(row[others], minlength=rows)
    return 1 + higher + np.where(found >= 0, 0, (rest + 1) // 2)


def _joined(parts: Mapping[str, Sequence[np.ndarray]], targets: RankedTargets) -> Ranks:
    return {
        scoring: with_misses(np.concatenate(found) if found else np.empty(0), targets)
        for scoring, found in parts.items()
    }
