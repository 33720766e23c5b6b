"""Evaluation of a model and of baselines on a window that the model was not trained on."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from xsmoe.data import WindowSplits
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.out_of_memory import explain_ranking_oom
from xsmoe.stream.evaluation.baselines import choose_half_life, rank_baselines
from xsmoe.stream.evaluation.metrics import per_user, summarize, summarize_targets
from xsmoe.stream.evaluation.seen_items import SeenItemHistory
from xsmoe.stream.evaluation.targets import SCORINGS, RankedTargets, Ranks, rank_targets
from xsmoe.stream.hidden_states.device_cache import DeviceCachedFeatures

MODEL = "model"
GROUP_METRICS = ("HR@10", "NDCG@10")
JUDGED = {"metric": "HR@10", "scoring": "masked", "group": "new"}
"""The result that the verdict is based on."""


def evaluate_window(
    model: Recommender, features: ItemFeatures, splits: WindowSplits, seen: SeenItemHistory, config: StreamConfig
) -> dict[str, Any]:
    """Rank each user's targets of a window among all items up to and including that window.

    Args:
        model: model of the previous window.
        features: the items' hidden states.
        splits: splits of the test window.
        seen: seen items before that window.
        config: the device, which items are targets, and whether repeats count as misses.

    Returns:
        "candidates": the number of candidates.

        For each user's last target, without items seen in earlier windows: summaries (see `summarize`) of the model
        over "all" users and over users with a "cold" target, which was never trained on; by baseline summaries of
        "popularity" and of the model's "lift" over it, user by user.

        For all "targets" (config.targets): "half_life" of decayed popularity; "groups": summaries over targets (see
        `summarize_targets`) by scoring (`SCORINGS`), by group (all, new to the user, repeats, cold) and by "model" or
        baseline (`BASELINES`); "by_user", for the verdict: each user's targets and hits in the group `JUDGED`.
    """
    targets = RankedTargets.build(splits.all_pairs, seen.known_with(splits), seen.history, config)
    with explain_ranking_oom(config, "the test on a window", cached=isinstance(features, DeviceCachedFeatures)):
        model_ranks = rank_targets(model, features, targets, torch.device(config.device))
    half_life = choose_half_life(seen, config)
    ranks = {MODEL: model_ranks, **rank_baselines(targets, seen, half_life.seconds)}
    groups = {
        "all": np.ones(len(targets), dtype=bool),
        "new": ~targets.repeated,
        "repeats": targets.repeated,
        "cold": ~np.isin(targets.items_to_find, seen.trained),
    }
    return {
        "candidates": len(targets.candidates),
        **_last_targets(ranks, groups["cold"], len(targets.users)),
        "targets": config.targets,
        "half_life": half_life.to_dict(),
        "groups": _groups(ranks, groups, targets.users[targets.row]),
        "by_user": _by_user(ranks, groups[JUDGED["group"]], targets.users[targets.row]),
    }


def _last_targets(ranks: Mapping[str, Ranks], cold: np.ndarray, users: int) -> dict[str, Any]:
    """Summarize the last targets, which are the first `users` ones, without items seen in earlier windows."""
    model = per_user(ranks[MODEL]["seen"][:users])
    popular = {name: per_user(ranks[name]["seen"][:users]) for name in ("all_time", "last_window")}
    return {
        "all": summarize(model),
        "cold": summarize({name: values[cold[:users]] for name, values in model.items()}),
        "popularity": {name: summarize(values) for name, values in popular.items()},
        "lift": {
            name: summarize({metric: model[metric] - values[metric] for metric in model})
            for name, values in popular.items()
        },
    }


def _groups(ranks: Mapping[str, Ranks], groups: Mapping[str, np.ndarray], users: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {scoring: {group: {} for group in groups} for scoring in SCORINGS}
    for name, by_scoring in ranks.items():
        for scoring, values in by_scoring.items():
            metrics = per_user(values)
            for group, members in groups.items():
                chosen = {metric: metrics[metric][members] for metric in GROUP_METRICS}
                found[scoring][group][name] = summarize_targets(chosen, users[members])
    return found


def _by_user(ranks: Mapping[str, Ranks], members: np.ndarray, users: np.ndarray) -> dict[str, Any]:
    """Return counts for each user. From these, errors over several windows can be clustered by user."""
    distinct, user, counts = np.unique(users[members], return_inverse=True, return_counts=True)
    hits = {}
    for name, by_scoring in ranks.items():
        hit = per_user(by_scoring[JUDGED["scoring"]][members])[JUDGED["metric"]] > 0
        hits[name] = np.bincount(user[hit], minlength=len(distinct)).tolist()
    return {**JUDGED, "users": distinct.tolist(), "targets": counts.tolist(), "hits": hits}
