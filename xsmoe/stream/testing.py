"""Testing a model on a window that it was not trained on, beside popularity."""

from typing import Any

import numpy as np
import torch

from xsmoe.data import WindowSplits
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.evaluation import RankingTask, rank_with_model, rank_with_popularity
from xsmoe.stream.memory import StreamMemory
from xsmoe.stream.metrics import per_user, summarize
from xsmoe.stream.out_of_memory import ranking_memory
from xsmoe.stream.resident import ResidentFeatures


def evaluate_window(
    model: Recommender, features: ItemFeatures, splits: WindowSplits, memory: StreamMemory, config: StreamConfig
) -> dict[str, Any]:
    """Ranks each user's last item of a window among all items up to and including that window.

    Args:
        model: of the window before.
        features: the items' hidden states.
        splits: of the window to test on.
        memory: what the stream has shown before that window.
        config: the device, and whether repeats count.

    Returns:
        "candidates"; summaries (see `summarize`) of the model over "all" users and over those whose target is "cold",
        never trained on; and by baseline those of "popularity" and of the model's "lift" over it, user by user.
    """
    task = RankingTask.build(splits.test, memory.known_with(splits), memory.history, config.repeats or "rank")
    with ranking_memory(config, "the test on a window", resident=isinstance(features, ResidentFeatures)):
        mine = per_user(rank_with_model(model, features, task, torch.device(config.device)))
    cold = ~np.isin(task.candidates[task.targets], memory.trained)
    popular = {
        name: per_user(rank_with_popularity(counts, task))
        for name, counts in memory.popularity(task.candidates).items()
    }
    return {
        "candidates": len(task.candidates),
        "all": summarize(mine),
        "cold": summarize({name: values[cold] for name, values in mine.items()}),
        "popularity": {name: summarize(values) for name, values in popular.items()},
        "lift": {
            name: summarize({metric: mine[metric] - values[metric] for metric in mine})
            for name, values in popular.items()
        },
    }
