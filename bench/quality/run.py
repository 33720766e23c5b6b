"""One variant with one seed: trained over the stream, tested on every next window, and, for a matrix, on all others."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.quality.encoders import Experts, build
from bench.quality.sources import Source
from bench.quality.variants import Variant
from xsmoe.cli.commands.train import cut_settings
from xsmoe.cli.run_config import RunConfig
from xsmoe.data import Dataset, Window
from xsmoe.encoders import HiddenStateStore
from xsmoe.nn import Recommender
from xsmoe.report import results
from xsmoe.report.verdict import judge
from xsmoe.stream import Stream, StreamingTrainer
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model
from xsmoe.stream.evaluation.metrics import per_user
from xsmoe.stream.state.best_epoch import snapshot
from xsmoe.stream.state.saved_conditions import split_state

METRICS = ("HR@10", "NDCG@10")
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        variant, seed: which run.
        source: its data.
        settings: what all variants set beside the source, as the command line says.
        matrix: whether every window's model is tested on every window.
        commit: of the code, for the record.
        path: where the record goes.
        experts: of every level, for a static variant.
    """

    variant: Variant
    seed: int
    source: Source
    settings: Mapping[str, Any]
    matrix: bool
    commit: str | None
    path: Path
    experts: Experts | None = None

    def config(self) -> RunConfig:
        """Return the run's settings."""
        given = {**self.source.settings, **self.settings, **self.variant.settings, "seed": self.seed}
        given |= {"dataset": self.source.dataset, "store": self.source.store}
        return RunConfig.new(given, HiddenStateStore.open(self.source.store))

    def key(self) -> dict[str, Any]:
        """Return what decides about the results, as plain JSON values: a record with another key is of another run."""
        settings = {name: value for name, value in self.config().settings().items() if name not in ("dataset", "store")}
        store = HiddenStateStore.open(self.source.store)
        key = {
            "settings": settings,
            "kind": self.variant.kind,
            "experts": self.experts,
            "items": store.fingerprint(store.num_items),
        }
        return dict(json.loads(json.dumps(key)))


def perform(job: Job) -> Record:
    """Train and test one variant.

    Returns:
        "variant", "seed", "commit", "key"; "experts" of every level at the end; "tests", for each window but the first
        its number, the names of its users, the rank of each one's last item (0: a sure miss) and the means of
        `METRICS`; "groups", the means over all targets by scoring and group, and "verdict"; "cost"; "seconds" of all
        of it; and "matrix", by metric, a row for each window's model and a column for each tested window, or None.
    """
    begin = time.monotonic()
    config = job.config()
    store = HiddenStateStore.open(config.store)
    stream = Stream.build(
        Dataset.load(config.dataset).interactions,
        store,
        config.windows,
        modalities=config.modalities,
        missing=config.missing,
        **cut_settings(config),
    )
    tasks: list[RankingTask] = []
    tests: list[Record] = []
    states: list[dict[str, torch.Tensor]] = []
    with StreamingTrainer(build(config, job.variant.kind, job.experts), stream, config.stream) as trainer:
        for number, window in enumerate(stream.windows):
            task, users = _task(trainer, window)
            tasks.append(task)
            if number > 0:
                with _uncounted(trainer.model):
                    ranks = rank_with_model(trainer.model, trainer.features, task, trainer.device)
                tests.append(_tested(number, stream.user_ids[users], ranks))
            trainer.step(window)
            if job.matrix:
                states.append(snapshot(trainer.model))
        lines = [line for line in trainer.metrics if line["kind"] == "test"]
        matrix = None
        if job.matrix:
            matrix = _matrix(build(config, job.variant.kind, job.experts), states, tasks, trainer)
        spent = results.cost(trainer.metrics)
        experts = {name: side.num_experts for name, side in trainer.model.items.ladders().items()}
    return {
        "variant": job.variant.name,
        "seed": job.seed,
        "commit": job.commit,
        "key": job.key(),
        "experts": {} if job.variant.kind == "linear" else experts,
        "tests": tests,
        "groups": _groups(lines),
        "verdict": _verdict(lines),
        "cost": None if spent is None else asdict(spent),
        "seconds": time.monotonic() - begin,
        "matrix": matrix,
    }


@contextmanager
def _uncounted(model: Recommender) -> Iterator[None]:
    """Leave the utilization alone, in which an evaluation counts under "paper": the trainer prunes by it."""
    banks = [bank for _, _, bank in model.items.banks()]
    before = [bank.count_in_eval for bank in banks]
    try:
        for bank in banks:
            bank.count_in_eval = False
        yield
    finally:
        for bank, counted in zip(banks, before, strict=True):
            bank.count_in_eval = counted


def _task(trainer: StreamingTrainer, window: Window) -> tuple[RankingTask, np.ndarray]:
    """Return the test of the next window with what the stream has shown before it, and its users (B,)."""
    splits, memory = trainer.config.split(window), trainer.memory
    task = RankingTask.build(splits.test, memory.known_with(splits), memory.history, trainer.config.repeats)
    return task, splits.test.users


def _tested(window: int, users: np.ndarray, ranks: np.ndarray) -> Record:
    values = per_user(ranks)
    return {
        "window": window,
        **{metric: _mean(values[metric]) for metric in METRICS},
        "users": users.tolist(),
        "ranks": np.where(np.isfinite(ranks), ranks, 0).astype(np.int64).tolist(),
    }


def _matrix(
    model: Recommender, states: list[dict[str, torch.Tensor]], tasks: list[RankingTask], trainer: StreamingTrainer
) -> dict[str, list[list[float | None]]]:
    """Rank the test of every window with the model of every window."""
    model = model.to(trainer.device)
    rows: dict[str, list[list[float | None]]] = {metric: [] for metric in METRICS}
    _, conditions = split_state(trainer.model)
    for state in states:
        model.load_state_dict({**state, **conditions})
        tested = [per_user(rank_with_model(model, trainer.features, task, trainer.device)) for task in tasks]
        for metric in METRICS:
            rows[metric].append([_mean(values[metric]) for values in tested])
    return rows


def _groups(tests: list[Record]) -> dict[str, dict[str, float]]:
    """Return the model's HR@10 by scoring and group over all targets of all tests; {} where no test has groups."""
    return {
        scoring: {group: found["model"]["HR@10"] for group, found in groups.items() if found["targets"]}
        for scoring, groups in results.groups(tests).items()
    }


def _verdict(tests: list[Record]) -> dict[str, Any]:
    """Return the verdict over all tests, as report/summary.json has it."""
    found = asdict(judge(tests))
    return {name: found[name] for name in ("verdict", "baseline", "difference", "standard_error")}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
