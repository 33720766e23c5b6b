"""How XSMoE's paper (arXiv 2508.05993) evaluates, as its code does: windows, splits, ranks and what they sum to.

It shares no code with the library, and is an oracle for tests; the bench ranks the published model with it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Interaction = tuple[object, int, int]  # user, item, timestamp


def published_rank(scores: Tensor, target: int, history: Sequence[int]) -> float:
    """1-based place of `target` among scores (num_items,), ties by index; inf for a target in the history."""
    if target in history:
        return math.inf
    masked = scores.clone()
    for item in history:
        masked[item] = -math.inf
    order = torch.argsort(masked, descending=True, stable=True).tolist()
    return float(order.index(target) + 1)


def hit_ratio(ranks: Sequence[float], k: int) -> float:
    """HR@k, between 0 and 1."""
    return sum(rank <= k for rank in ranks) / len(ranks)


def ndcg(ranks: Sequence[float], k: int) -> float:
    """NDCG@k with one relevant item per rank, between 0 and 1."""
    return sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k) / len(ranks)


class Split(NamedTuple):
    train: dict[object, list[int]]
    validation: dict[object, list[int]]
    test: dict[object, list[int]]


def published_windows(interactions: Sequence[Interaction], num_windows: int) -> list[list[Interaction]]:
    """Windows of equal count, of (user, item, timestamp) sorted by the timestamp's text; bounds are i * n // T."""
    ordered = sorted(interactions, key=lambda row: str(row[2]))
    n, t = len(ordered), num_windows
    return [ordered[i * n // t : (i + 1) * n // t] for i in range(t)]


def published_split(window_interactions: Sequence[Interaction], k_core: int, max_items: int = 11) -> Split:
    """Cut one window, (user, item, timestamp) in time order, into user -> items for train, validation and test.

    Users need k_core interactions of the window. Train is the first 85 % of what is left, validation the rest, test
    all of it; a user keeps the last max_items in each, and is in it with at least 2.
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
