"""Results of a run's metrics: its windows, the comparison with baselines, and the cost."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xsmoe.stream.evaluation.metrics import pool
from xsmoe.stream.evaluation.window_evaluation import MODEL

Line = Mapping[str, Any]

POPULARITY = {"all_time": "popular of all time", "last_window": "popular in the last window"}
COMPARED = ("HR@10", "NDCG@10")


@dataclass
class WindowResult:
    """One window of a run.

    Attributes:
        number: its position in the stream.
        trained: its line of kind "window"; None while it is in training.
        test: the test of its model on the next window; None before that test.
        epochs: its lines of kind "epoch".
    """

    number: int
    trained: Line | None = None
    test: Line | None = None
    epochs: list[Line] = field(default_factory=list)


def window_results(metrics: Iterable[Line]) -> list[WindowResult]:
    """Group the lines of metrics.jsonl by window."""
    results: dict[int, WindowResult] = {}
    for line in metrics:
        result = results.setdefault(line["window"], WindowResult(line["window"]))
        if line["kind"] == "epoch":
            result.epochs.append(line)
        elif line["kind"] == "window":
            result.trained = line
        else:
            result.test = line
    return [results[number] for number in sorted(results)]


@dataclass(frozen=True)
class Comparison:
    """The model and the popularity baselines in one metric, over the last targets of all tests; seen items are masked.

    Attributes:
        metric: name of the metric.
        users: number of users.
        model, model_se: the model's mean and standard error.
        baselines: the mean and the standard error of each popularity baseline.
        best: the baseline with the highest mean.
        lift, lift_se: mean over users of the model's value minus the best baseline's, and its standard error.
    """

    metric: str
    users: int
    model: float
    model_se: float
    baselines: dict[str, tuple[float, float]]
    best: str
    lift: float
    lift_se: float


def compare(tests: Sequence[Line], metrics: Sequence[str] = COMPARED) -> list[Comparison]:
    """Compare the model with popularity over these tests. Return an empty list if no user was tested."""
    model = pool(test["all"] for test in tests)
    if not model["users"]:
        return []
    baselines = {name: pool(test["popularity"][name] for test in tests) for name in POPULARITY}
    comparisons = []
    for metric in metrics:
        best = max(baselines, key=lambda name: baselines[name][metric])
        lift = pool(test["lift"][best] for test in tests)
        comparisons.append(
            Comparison(
                metric=metric,
                users=model["users"],
                model=model[metric],
                model_se=model["se"][metric],
                baselines={name: (found[metric], found["se"][metric]) for name, found in baselines.items()},
                best=best,
                lift=lift[metric],
                lift_se=lift["se"][metric],
            )
        )
    return comparisons


Groups = dict[str, dict[str, dict[str, Any]]]


def groups(tests: Sequence[Line]) -> Groups:
    """Pool tests by scoring and group: the number of "targets", and the means of "model" and of each baseline.

    Every target has equal weight. Tests of earlier versions have no groups and are left out.
    """
    found = [test["groups"] for test in tests if "groups" in test]
    pooled: Groups = {}
    for scoring, by_group in found[0].items() if found else ():
        pooled[scoring] = {}
        for group, by_name in by_group.items():
            parts = {name: pool([test[scoring][group][name] for test in found], weight="targets") for name in by_name}
            means = {name: {metric: part.get(metric) for metric in COMPARED} for name, part in parts.items()}
            pooled[scoring][group] = {"targets": parts[MODEL]["targets"], **means}
    return pooled


@dataclass(frozen=True)
class LeftOut:
    """Numbers of interactions that were not trained on, without those of validation splits.

    Attributes:
        interactions: all interactions of the windows.
        k_core: interactions of users with too few interactions in their window.
        no_sequence: interactions of training splits that are in no sequence.
    """

    interactions: int
    k_core: int
    no_sequence: int

    def __str__(self) -> str:
        return (
            f"Of the {self.interactions} interactions in windows, {self.k_core} are left out because their users have "
            f"fewer than k_core in the window; {self.no_sequence} of the training splits are in no sequence, as a "
            "user's only one there, or as earlier ones with history last"
        )


def left_out(metrics: Iterable[Line]) -> LeftOut | None:
    """Count the interactions that windows left out; None if no finished window has recorded them."""
    done = [line for line in metrics if line["kind"] == "window" and "left_out" in line]
    if not done:
        return None
    k_core, no_sequence = (sum(line["left_out"][name] for line in done) for name in ("k_core", "no_sequence"))
    return LeftOut(sum(line["interactions"] for line in done), k_core, no_sequence)


@dataclass(frozen=True)
class Cost:
    """Time and memory of a run.

    Attributes:
        seconds: time of epochs and tests, without work that interruptions lost.
        step_ms: mean time of a training step.
        users_a_second: training users per second of training.
        peak_rss_mib: peak memory of the process.
        cuda_peak_mib: peak GPU memory; None on a CPU.
    """

    seconds: float
    step_ms: float
    users_a_second: float
    peak_rss_mib: float
    cuda_peak_mib: float | None

    def __str__(self) -> str:
        cuda = "" if self.cuda_peak_mib is None else f", {self.cuda_peak_mib:.0f} MiB on the GPU"
        return (
            f"{self.seconds:.1f} s for training and tests, {self.step_ms:.1f} ms a step, "
            f"{self.users_a_second:.0f} users/s, peak memory {self.peak_rss_mib:.0f} MiB{cuda}"
        )


def cost(metrics: Sequence[Line]) -> Cost | None:
    """Return the time and memory of a run; None before its first window is finished."""
    done = {line["window"]: line["users"] for line in metrics if line["kind"] == "window"}
    epochs = [line for line in metrics if line["kind"] == "epoch" and line["window"] in done]
    if not epochs:
        return None
    steps = sum(line["steps"] for line in epochs)
    training = sum(line["steps"] * line["time"]["step_ms"] for line in epochs) / 1000
    return Cost(
        seconds=sum(line["time"]["seconds"] for line in metrics if line["kind"] != "window"),
        step_ms=1000 * training / steps,
        users_a_second=sum(done[line["window"]] for line in epochs) / training,
        peak_rss_mib=max(line["time"]["peak_rss_mib"] for line in metrics),
        cuda_peak_mib=max((line["time"].get("cuda_peak_mib", 0.0) for line in metrics), default=0.0) or None,
    )


Births = dict[str, list[list[list[int]]]]


def expert_births(results: Sequence[WindowResult]) -> Births:
    """Return, for each modality, level and window, the window in which each expert was added.

    Indices shift when an expert is pruned, so an index alone does not identify an expert.
    """
    births: Births = {}
    current: dict[str, list[list[int]]] = {}
    for before, result in zip([None, *results], results, strict=False):
        if result.trained is None:
            break
        if before is None or before.test is None:
            current = {name: [[0] * count for count in counts] for name, counts in result.trained["experts"].items()}
        else:
            for name, drops in before.test["pruned"].items():
                for drop in drops:
                    del current[name][drop["level"]][drop["expert"]]
            for name, levels in before.test["expanded"].items():
                for level in levels:
                    current[name][level["level"]].append(result.number)
        for name, experts in current.items():
            places = births.setdefault(name, [[] for _ in experts])
            for place, alive in zip(places, experts, strict=True):
                place.append(list(alive))
    return births
