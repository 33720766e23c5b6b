"""Summaries of run records: means, standard errors, and paired differences to the base variant."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.e2e.quality.run import METRICS, Record, mean
from bench.e2e.quality.variants import BASE, VARIANTS
from xsmoe.stream.evaluation.metrics import clustered_error, per_user

KIND, SCHEMA = "quality", 1
Found = dict[str, Any]
Pairs = Sequence[tuple[Record, Record]]
"""The run of a variant and that of the base, for each seed that both have."""


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
    for record in sorted(records, key=lambda record: record["seed"]):
        by_variant.setdefault(record["variant"], {})[record["seed"]] = record
    base = by_variant.get(BASE, {})
    found = {}
    for name in (name for name in VARIANTS if name in by_variant):
        runs = by_variant[name]
        pairs = [(run, base[seed]) for seed, run in runs.items() if seed in base and name != BASE]
        found[name] = {"sentence": VARIANTS[name].sentence, **_variant(list(runs.values()), pairs, shared)}
    return found


def _variant(runs: Sequence[Record], pairs: Pairs, shared: bool) -> Found:
    pooled = {metric: _pooled(metric) for metric in METRICS}
    difference = None
    if pairs:
        difference = {
            metric: {**_paired(pairs, value), "se_users": user_error(pairs, metric, shared=shared)}
            for metric, value in pooled.items()
        }
    tests = [test for run in runs for test in run["tests"]]
    verdicts = sorted(run["verdict"]["verdict"] for run in runs if run["verdict"] is not None)
    experts = [np.mean([n for levels in run["experts"].values() for n in levels]) for run in runs if run["experts"]]
    costs = [run["cost"] for run in runs if run["cost"] is not None]
    matrices = [run["matrix"] for run in runs if run["matrix"] is not None]
    return {
        "seeds": [run["seed"] for run in runs],
        **{metric: over_seeds(map(value, runs)) for metric, value in pooled.items()},
        "difference": difference,
        "groups": _groups(runs, pairs),
        "windows": {
            str(window): over_seeds(test["HR@10"] for test in tests if test["window"] == window)
            for window in sorted({test["window"] for test in tests})
        },
        "verdicts": {verdict: verdicts.count(verdict) for verdict in verdicts},
        "experts": mean(experts),
        "train_seconds": mean([cost["seconds"] for cost in costs]),
        "peak_rss_mib": mean([cost["peak_rss_mib"] for cost in costs]),
        "commits": sorted({str(run["commit"]) for run in runs}),
        "matrix": {metric: matrix_summary([m[metric] for m in matrices]) for metric in METRICS} if matrices else None,
    }


def over_seeds(values: Iterable[float | None]) -> Found:
    """Return "values", their "mean" and its standard error "se" over seeds, each None if there are too few values."""
    every = list(values)
    known = [value for value in every if value is not None]
    error = float(np.std(known, ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    return {"values": every, "mean": mean(known), "se": error}


def user_error(pairs: Pairs, metric: str, *, shared: bool) -> float | None:
    """Return the standard error of a mean difference, clustered by user (`clustered_error`).

    If `shared`, a user name means the same user in all seeds. The result is None if the runs of a pair tested different
    users, or fewer than two.
    """
    sums: dict[tuple[int, str], float] = {}
    counts: dict[tuple[int, str], int] = {}
    for place, (mine, theirs) in enumerate(pairs):
        users, others = ([user for test in run["tests"] for user in test["users"]] for run in (mine, theirs))
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
    _, models, windows = values.shape
    model, tested = np.arange(models)[:, None], np.arange(windows)[None, :]
    change = values - np.diagonal(values, axis1=1, axis2=2)[:, None, :]

    def known_mean(of: np.ndarray) -> float | None:
        return mean(of[np.isfinite(of)])

    def over_windows(of: np.ndarray, chosen: np.ndarray) -> Found:
        return over_seeds(known_mean(one) for one in of[:, chosen])

    return {
        "mean": [[known_mean(values[:, row, column]) for column in range(windows)] for row in range(models)],
        "own": over_windows(values, model == tested),
        "next": over_windows(values, tested == model + 1),
        "backward": over_windows(change, model > tested),
        "last": over_windows(change, (model == models - 1) & (model > tested)),
        "forward": over_windows(values, tested > model + 1),
    }


def _groups(runs: Sequence[Record], pairs: Pairs) -> dict[str, dict[str, Found]]:
    found: dict[str, dict[str, Found]] = {}
    for scoring, group in dict.fromkeys((s, g) for run in runs for s, groups in run["groups"].items() for g in groups):

        def value(run: Record, scoring: str = scoring, group: str = group) -> float | None:
            rate: float | None = run["groups"].get(scoring, {}).get(group)
            return rate

        difference = _paired(pairs, value) if pairs else None
        found.setdefault(scoring, {})[group] = {**over_seeds(map(value, runs)), "difference": difference}
    return found


def _pooled(metric: str) -> Callable[[Record], float | None]:
    """Return a function that returns the mean of a metric over all users of all tests of a run."""
    return lambda run: mean(_values(run)[metric])


def _paired(pairs: Pairs, value: Callable[[Record], float | None]) -> Found:
    """Return the differences of a value between a variant and the base, over seeds."""
    both = [(value(mine), value(theirs)) for mine, theirs in pairs]
    return over_seeds(None if mine is None or theirs is None else mine - theirs for mine, theirs in both)


def _values(run: Record) -> Mapping[str, np.ndarray]:
    """Return the metrics of each user of each test of a run."""
    ranks = np.array([rank for test in run["tests"] for rank in test["ranks"]], dtype=float)
    return per_user(np.where(ranks > 0, ranks, np.inf))
