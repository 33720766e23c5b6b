"""The evaluation of the XSMoE paper (arXiv 2508.05993) as its code implements it: windows, splits, ranks, metrics.

It shares no code with the library. `python -m bench stream` ranks the paper's model with it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Interaction = tuple[object, int, int]  # user, item, timestamp


def target_rank(scores: Tensor, target: int, history: Sequence[int]) -> float:
    """Return the 1-based rank of `target` among scores (num_items,), ties by index; inf for a target in the history."""
    if target in history:
        return math.inf
    masked = scores.clone()
    for item in history:
        masked[item] = -math.inf
    order = torch.argsort(masked, descending=True, stable=True).tolist()
    return float(order.index(target) + 1)


def hit_ratio(ranks: Sequence[float], k: int) -> float:
    """Return HR@k, between 0 and 1."""
    return sum(rank <= k for rank in ranks) / len(ranks)


def ndcg(ranks: Sequence[float], k: int) -> float:
    """Return NDCG@k with one relevant item per rank, between 0 and 1."""
    return sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k) / len(ranks)


class Split(NamedTuple):
    train: dict[object, list[int]]
    validation: dict[object, list[int]]
    test: dict[object, list[int]]


def cut_windows(interactions: Sequence[Interaction], num_windows: int) -> list[list[Interaction]]:
    """Cut (user, item, timestamp) into T windows with bounds i * n // T, sorted by the timestamp as text."""
    ordered = sorted(interactions, key=lambda row: str(row[2]))
    n, t = len(ordered), num_windows
    return [ordered[i * n // t : (i + 1) * n // t] for i in range(t)]


def split_window(window_interactions: Sequence[Interaction], k_core: int, max_items: int = 11) -> Split:
    """Split one window, (user, item, timestamp) in time order, into items by user for train, validation and test.

    Users with fewer than k_core interactions in the window are dropped. Train is the first 85 % of the other
    interactions, validation the rest, and test all of them. Each part keeps the last max_items of a user, and drops
    users with fewer than 2.
    """
    counts = Counter(user for user, _, _ in window_interactions)
    kept = [row for row in window_interactions if counts[row[0]] >= k_core]
    cut = int(0.85 * len(kept))
    return Split(*(_sequences(part, max_items) for part in (kept[:cut], kept[cut:], kept)))


def _sequences(interactions: Sequence[Interaction], max_items: int) -> dict[object, list[int]]:
    sequences: dict[object, list[int]] = {}
    for user, item, _ in interactions:
        sequences.setdefault(user, []).append(item)
    return {user: items[-max_items:] for user, items in sequences.items() if len(items) >= 2}
