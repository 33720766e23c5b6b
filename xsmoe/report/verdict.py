"""The verdict on a model: a comparison with the strongest baseline on items that are new to their user."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from xsmoe.stream.evaluation.metrics import clustered_error
from xsmoe.stream.evaluation.window_evaluation import JUDGED, MODEL

Line = Mapping[str, Any]

BASELINES = {
    "all_time": "popular of all time",
    "last_window": "popular in the last window",
    "decayed": "popular, decayed with time",
    "own_inputs": "the user's inputs again",
}
ENOUGH_ERRORS = 2
ENOUGH_USERS = 6
"""The minimum number of users for "above". If all six agree, a two-sided sign test has p = 2^-5 < 0.05.

The standard error of fewer users is too uncertain. With two users, chance exceeds two standard errors in 15 % of cases
on either side.
"""


@dataclass(frozen=True)
class Verdict:
    """The model and the strongest baseline, over all tests, on targets new to the user; earlier items are masked.

    Attributes:
        verdict: "above" if the difference is more than two standard errors above 0 and there are at least six users.
            (The standard error is 0 if all users have the same difference.) "not_above" otherwise. "unknown" if the
            tests allow no statement.
        metric: the compared metric.
        targets, users: numbers of targets and users.
        baseline: the baseline with the highest mean, a key of `BASELINES`; None if unknown.
        model_mean, baseline_mean: means of the metric.
        difference: the model's mean minus the baseline's.
        standard_error: standard error of the difference, paired, clustered by user over all windows.
        reason: why the verdict is unknown, or which tests were left out; None if neither applies.
    """

    verdict: Literal["above", "not_above", "unknown"]
    metric: str = JUDGED["metric"]
    targets: int = 0
    users: int = 0
    baseline: str | None = None
    model_mean: float | None = None
    baseline_mean: float | None = None
    difference: float | None = None
    standard_error: float | None = None
    reason: str | None = None

    def __str__(self) -> str:
        if self.verdict == "unknown":
            return f"Nothing can be said about quality: {self.reason}."
        word = "above" if self.verdict == "above" else "NOT above"
        title = BASELINES[self.baseline or ""]
        mine, best, error = (_percent(value) for value in (self.model_mean, self.baseline_mean, self.standard_error))
        by, spread = "", " for each user"
        if self.standard_error:
            by = " by more than two standard errors" if self.users >= ENOUGH_USERS else ""
            spread = f" ± {error}"
        note = "" if self.reason is None else f" {self.reason[0].upper()}{self.reason[1:]}."
        return (
            f"The model is {word} the strongest baseline ({title}){by}: {self.metric} on items new to the user "
            f"{mine} % against {best} %, difference {_percent(self.difference, '+')}{spread} "
            f"({self.targets} targets of {self.users} users).{note}"
        )


def judge(tests: Sequence[Line]) -> Verdict:
    """Compare the model with the strongest baseline over tests, which are lines of kind "test" of metrics.jsonl.

    Lines of earlier versions lack the necessary fields. They are left out, and `reason` states their number.
    """
    if not tests:
        return Verdict("unknown", reason="no window was tested")
    found = [test["by_user"] for test in tests if "by_user" in test]
    if not found:
        return Verdict("unknown", reason="the tests were recorded by a version that ranked last targets only")
    left_out = len(tests) - len(found)
    reason = f"{left_out} of {len(tests)} tests, recorded by an earlier version, are left out" if left_out else None
    users, user = np.unique(np.concatenate([_array(part["users"]) for part in found]), return_inverse=True)
    if not len(users):
        return Verdict("unknown", reason="no user was tested on an item that was new to the user")

    def total(parts: Sequence[Sequence[int]]) -> np.ndarray:
        sums = np.zeros(len(users), np.int64)
        np.add.at(sums, user, np.concatenate([_array(part) for part in parts]))
        return sums

    counts, mine = total([part["targets"] for part in found]), total([part["hits"][MODEL] for part in found])
    hits = {name: total([part["hits"][name] for part in found]) for name in BASELINES}
    baseline = max(hits, key=lambda name: hits[name].sum())
    targets, gained = int(counts.sum()), mine - hits[baseline]
    difference, error = float(gained.sum() / targets), clustered_error(gained, counts)
    if error is None:
        verdict: Literal["above", "not_above", "unknown"] = "unknown"
        reason = "a single user was tested on items that were new to the user, and a standard error needs two"
    else:
        verdict = "above" if difference > ENOUGH_ERRORS * error else "not_above"
        if verdict == "above" and len(users) < ENOUGH_USERS:
            verdict = "not_above"
            few = f"{len(users)} users are too few to say more, {ENOUGH_USERS} are needed"
            reason = few if reason is None else f"{few}; {reason}"
    return Verdict(
        verdict=verdict,
        targets=targets,
        users=len(users),
        baseline=baseline,
        model_mean=float(mine.sum() / targets),
        baseline_mean=float(hits[baseline].sum() / targets),
        difference=difference,
        standard_error=error,
        reason=reason,
    )


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.2f}"


def _array(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)
