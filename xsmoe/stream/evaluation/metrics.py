"""Ranking metrics: HR, NDCG and MRR of each target, and their standard errors over users."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

CUTOFFS = (10, 20)


def per_user(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Return every metric for every user.

    Args:
        ranks: (B,) float64, each target's rank, starting at 1; infinite for a miss.

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
    """Return mean and standard error over users of each metric, and the number of users. No users give None."""
    users = len(next(iter(values.values())))
    return {
        "users": users,
        **{name: float(v.mean()) if users else None for name, v in values.items()},
        "se": {name: float(v.std(ddof=1) / np.sqrt(users)) if users > 1 else None for name, v in values.items()},
    }


def summarize_targets(values: Mapping[str, np.ndarray], users: np.ndarray) -> dict[str, Any]:
    """Return the mean of each metric over targets, and its standard error clustered by user (`clustered_error`).

    Args:
        values: each (T,) float64.
        users: (T,) int64, the user of each target.

    Returns:
        The numbers of "targets" and "users", the means, and "se". Means are None without targets, errors are None for
        fewer than 2 users.
    """
    distinct, user, counts = np.unique(users, return_inverse=True, return_counts=True)
    sums = {name: np.bincount(user, weights=v, minlength=len(distinct)) for name, v in values.items()}
    return {
        "targets": len(users),
        "users": len(distinct),
        **{name: float(v.mean()) if len(users) else None for name, v in values.items()},
        "se": {name: clustered_error(total, counts) for name, total in sums.items()},
    }


def clustered_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the standard error of a mean over targets, clustered by user; None for fewer than 2 users.

    With the sum s_u of user u over n_u targets, the totals S and N and G users, the error is
    `sqrt(G / (G - 1) * sum_u (s_u - n_u S / N)^2) / N`. With one target for each user it is the error of a plain mean.
    For whole numbers the residuals are exactly 0 if all users have the same mean.

    Source: Liang and Zeger, "Longitudinal data analysis using generalized linear models", Biometrika 73 (1986).

    Args:
        sums: (G,) each user's sum over its targets.
        counts: (G,) each user's number of targets, at least 1.
    """
    users = len(sums)
    if users < 2:
        return None
    total = counts.sum()
    residuals = (sums * total - sums.sum() * counts) / total
    return float(np.sqrt(users / (users - 1) * (residuals**2).sum()) / total)


def pool(summaries: Iterable[Mapping[str, Any]], weight: str = "users") -> dict[str, Any]:
    """Combine the summaries of several windows. Every user of every window has the same weight.

    Windows are independent strata: the standard error is that of the users within them.

    Args:
        summaries: results of `summarize` or `summarize_targets`.
        weight: "users", or "targets" if users have several targets.
    """
    parts = [s for s in summaries if s[weight]]
    users = sum(s[weight] for s in parts)
    names = [name for name in parts[0] if name not in ("targets", "users", "se")] if parts else []
    pooled: dict[str, Any] = {weight: users, "se": {}}
    for name in names:
        pooled[name] = sum(s[weight] * s[name] for s in parts) / users
        variances = [(s[weight] * (s["se"][name] or 0.0)) ** 2 for s in parts]
        pooled["se"][name] = sum(variances) ** 0.5 / users
    return pooled
