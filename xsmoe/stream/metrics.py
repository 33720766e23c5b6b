"""Ranking metrics with one target a user: HR, NDCG and MRR, and their standard errors over users."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

CUTOFFS = (10, 20)


def per_user(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric for every user.

    Args:
        ranks: (B,) float64, each target's rank from 1 on; infinite = a miss.

    Returns:
        "HR@k", "NDCG@k" for k of 10 and 20, and "MRR", each (B,).
    """
    values = {}
    for cutoff in CUTOFFS:
        hit = ranks <= cutoff
        values[f"HR@{cutoff}"] = hit.astype(np.float64)
        values[f"NDCG@{cutoff}"] = np.where(hit, 1 / np.log2(1 + ranks), 0.0)
    values["MRR"] = 1 / ranks
    return values


def summarize(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean and standard error over users of each metric, and the number of users. No users give None."""
    users = len(next(iter(values.values())))
    return {
        "users": users,
        **{name: float(v.mean()) if users else None for name, v in values.items()},
        "se": {name: float(v.std(ddof=1) / np.sqrt(users)) if users > 1 else None for name, v in values.items()},
    }


def pool(summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Summaries of several windows as one, every user of every window with equal weight.

    Windows are independent strata: the standard error is that of the users within them.
    """
    parts = [s for s in summaries if s["users"]]
    users = sum(s["users"] for s in parts)
    names = [name for name in parts[0] if name not in ("users", "se")] if parts else []
    pooled: dict[str, Any] = {"users": users, "se": {}}
    for name in names:
        pooled[name] = sum(s["users"] * s[name] for s in parts) / users
        variances = [(s["users"] * (s["se"][name] or 0.0)) ** 2 for s in parts]
        pooled["se"][name] = sum(variances) ** 0.5 / users
    return pooled
