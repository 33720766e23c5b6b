"""Summaries of run records: means, standard errors, and paired differences to the base variant."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.e2e.quality.run import METRICS, Record
from bench.e2e.quality.variants import BASE, VARIANTS
from xsmoe.stream.evaluation.metrics import clustered_error, per_user

KIND, SCHEMA = "quality", 1
Found = dict[str, Any]


def summarize(records: Sequence[Record], *, shared: bool) -> dict[str, Found]:
    """Summarize every variant.

    Args:
        records: of all variants and seeds, from `train_and_test`.
        shared: whether a user name means the same user in all seeds.

    Returns:
        By variant: "sentence"; "seeds"; for each metric the "values" of the seeds, their "mean" and its standard error
        "se"; "windows", the same of HR@10 for each tested window; "difference", the same of each metric minus the base
        variant, paired by seed; "groups", the same of HR@10 over all targets; "verdicts", the number of seeds with each
        verdict; "experts", "train_seconds" and "peak_rss_mib", means over seeds; "matrix", see `matrix_summary`.
    """
    by_variant: dict[str, dict[int, Record]] = {}
    for record in records:
        by_variant.setdefault(record["variant"], {})[record["seed"]] = record
    order = [name for name in VARIANTS if name in by_variant]
    base = by_variant.get(BASE, {})
    return {name: _variant(name, by_variant[name], base, shared) for name in order}


def _variant(name: str, runs: Mapping[int, Record], base: Mapping[int, Record], shared: bool) -> Found:
    runs = dict(sorted(runs.items()))
    seeds = list(runs)
    found: Found = {"sentence": VARIANTS[name].sentence, "seeds": seeds}
    pooled = {seed: pooled_values(runs[seed]) for seed in seeds}
    for metric in METRICS:
        found[metric] = over_seeds([pooled[seed][metric] for seed in seeds])
    common = [seed for seed in seeds if seed in base]
    found["difference"] = None
    if name != BASE and common:
        theirs = {seed: pooled_values(base[seed]) for seed in common}
        found["difference"] = {
            metric: {
                **over_seeds([_minus(pooled[seed][metric], theirs[seed][metric]) for seed in common]),
                "se_users": user_error([(runs[seed], base[seed]) for seed in common], metric, shared=shared),
            }
            for metric in METRICS
        }
    found["groups"] = _groups([runs[seed] for seed in seeds], [base[seed] for seed in common] if name != BASE else [])
    numbers = sorted({test["window"] for run in runs.values() for test in run["tests"]})
    found["windows"] = {
        str(number): over_seeds(
            [test["HR@10"] for seed in seeds for test in runs[seed]["tests"] if test["window"] == number]
        )
        for number in numbers
    }
    verdicts = [run["verdict"]["verdict"] for run in runs.values() if run["verdict"] is not None]
    found["verdicts"] = {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))}
    experts = [
        np.mean([count for levels in run["experts"].values() for count in levels])
        for run in runs.values()
        if run["experts"]
    ]
    found["experts"] = float(np.mean(experts)) if experts else None
    costs = [run["cost"] for run in runs.values() if run["cost"] is not None]
    found["train_seconds"] = _mean([cost["seconds"] for cost in costs])
    found["peak_rss_mib"] = _mean([cost["peak_rss_mib"] for cost in costs])
    found["commits"] = sorted({str(run["commit"]) for run in runs.values()})
    matrices = [run["matrix"] for run in runs.values() if run["matrix"] is not None]
    found["matrix"] = (
        {metric: matrix_summary([one[metric] for one in matrices]) for metric in METRICS} if matrices else None
    )
    return found


def pooled_values(record: Record) -> dict[str, float | None]:
    """Return the mean of each metric over all users of all tests of a run."""
    values = _values(record)
    return {metric: float(values[metric].mean()) if len(values[metric]) else None for metric in METRICS}


def over_seeds(values: Sequence[float | None]) -> Found:
    """Return "values", their "mean" and its standard error "se" over seeds, each None if there are too few values."""
    known = [value for value in values if value is not None]
    error = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return {"values": list(values), "mean": _mean(known), "se": error}


def user_error(pairs: Sequence[tuple[Record, Record]], metric: str, *, shared: bool) -> float | None:
    """Return the standard error of a mean difference, clustered by user (`clustered_error`).

    Args:
        pairs: the runs of a variant and of the base, for each seed.
        metric: one of `METRICS`.
        shared: whether a user name means the same user in all seeds.

    Returns:
        None if the runs of a pair tested different users, or fewer than two.
    """
    sums: dict[tuple[int, str], float] = {}
    counts: dict[tuple[int, str], int] = {}
    for place, (mine, theirs) in enumerate(pairs):
        users, others = _users(mine), _users(theirs)
        if users != others:
            return None
        differences = _values(mine)[metric] - _values(theirs)[metric]
        for user, difference in zip(users, differences.tolist(), strict=True):
            unit = (0 if shared else place, user)
            sums[unit] = sums.get(unit, 0.0) + difference
            counts[unit] = counts.get(unit, 0) + 1
    return clustered_error(np.array(list(sums.values())), np.array(list(counts.values())))


def matrix_summary(matrices: Sequence[Sequence[Sequence[float | None]]]) -> Found:
    """Summarize tests of every window's model on every window.

    Args:
        matrices: for each seed a row for each model and a column for each tested window.

    Returns:
        "mean": the mean matrix over seeds. Means over windows, for each seed: "own", a model on its own window; "next",
        on the next window; "backward", later models on a window minus its own model, negative if models forget;
        "last", the same of the last model only; "forward", models on windows after the next.
    """
    values = np.array(matrices, dtype=float)
    windows = values.shape[1]
    model, tested = np.arange(windows)[:, None], np.arange(windows)[None, :]
    own = np.diagonal(values, axis1=1, axis2=2)
    change = values - own[:, None, :]

    def mean(of: np.ndarray, chosen: Any) -> Found:
        seeds = [float(np.nanmean(one)) if np.isfinite(one).any() else None for one in of[:, chosen]]
        return over_seeds(seeds)

    averaged = [
        [_mean([value for value in values[:, row, column] if np.isfinite(value)]) for column in range(values.shape[2])]
        for row in range(values.shape[1])
    ]
    return {
        "mean": averaged,
        "own": mean(values, model == tested),
        "next": mean(values, tested == model + 1),
        "backward": mean(change, model > tested),
        "last": mean(change, (model == windows - 1) & (model > tested)),
        "forward": mean(values, tested > model + 1),
    }


def _groups(runs: Sequence[Record], base: Sequence[Record]) -> dict[str, dict[str, Found]]:
    found: dict[str, dict[str, Found]] = {}
    theirs = {run["seed"]: run["groups"] for run in base}
    for scoring in dict.fromkeys(name for run in runs for name in run["groups"]):
        for group in dict.fromkeys(name for run in runs for name in run["groups"].get(scoring, {})):
            values = {run["seed"]: run["groups"].get(scoring, {}).get(group) for run in runs}
            others = {seed: groups.get(scoring, {}).get(group) for seed, groups in theirs.items()}
            found.setdefault(scoring, {})[group] = {
                **over_seeds(list(values.values())),
                "difference": over_seeds([_minus(values[seed], others[seed]) for seed in others]) if others else None,
            }
    return found


def _values(record: Record) -> dict[str, np.ndarray]:
    ranks = np.array([rank for test in record["tests"] for rank in test["ranks"]], dtype=float)
    return per_user(np.where(ranks > 0, ranks, np.inf))


def _users(record: Record) -> list[str]:
    return [user for test in record["tests"] for user in test["users"]]


def _minus(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or theirs is None else mine - theirs


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
