"""The training and the tests of one variant with one seed."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.e2e.quality.streams import Source
from bench.e2e.quality.variants import Kind, QualityVariant
from xsmoe.cli.commands.train import cut_settings
from xsmoe.cli.run_config import RunConfig
from xsmoe.data import Dataset
from xsmoe.encoders import HiddenStateStore
from xsmoe.nn import ExpertBank, Recommender
from xsmoe.report import results
from xsmoe.report.verdict import judge
from xsmoe.stream import Stream, StreamingTrainer
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model
from xsmoe.stream.evaluation.metrics import per_user
from xsmoe.stream.state.kept_weights import snapshot
from xsmoe.stream.state.saved_conditions import split_state
from xsmoe.stream.state.seeds import derive, seeded

METRICS = ("HR@10", "NDCG@10")
Record = dict[str, Any]
Experts = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Job:
    """The work of one process.

    Attributes:
        variant, seed: which run.
        source: its data.
        settings: settings of all variants from the command line.
        matrix: whether every window's model is tested on every window.
        commit: of the code, for the record.
        path: the file of the record.
        experts: number of experts of each level by modality, for a static variant.
    """

    variant: QualityVariant
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
        """Return everything that determines the results, as JSON values. Equal keys mean equal runs."""
        settings = {name: value for name, value in self.config().settings().items() if name not in ("dataset", "store")}
        store = HiddenStateStore.open(self.source.store)
        key = {
            "settings": settings,
            "kind": self.variant.kind,
            "experts": self.experts,
            "items": store.fingerprint(store.num_items),
        }
        return dict(json.loads(json.dumps(key)))


def train_and_test(job: Job) -> Record:
    """Train one variant window by window, and test each model on the next window.

    Returns:
        "variant", "seed", "commit", "key"; "experts" of each level at the end; "tests": for each window but the first
        its number, the user names, the rank of each user's last item (0 if it cannot be ranked) and the means of
        `METRICS`; "groups": the means over all targets by scoring and group; "verdict"; "cost"; "seconds" of the whole
        run; "matrix": by metric, a row for each window's model and a column for each tested window, or None.
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
    tasks, tests, states = [], [], []
    with StreamingTrainer(build_model(config, job.variant.kind, job.experts), stream, config.stream) as trainer:
        for number, window in enumerate(stream.windows):
            # The items and the history of the windows before.
            splits, seen = trainer.config.split(window), trainer.seen_items
            task = RankingTask.build(splits.test, seen.known_with(splits), seen.history, trainer.config.repeats)
            tasks.append(task)
            if number > 0:
                with _without_counting(trainer.model):
                    ranks = rank_with_model(trainer.model, trainer.features, task, trainer.device)
                tests.append(
                    {
                        "window": number,
                        **_means(ranks),
                        "users": stream.user_ids[splits.test.users].tolist(),
                        "ranks": np.where(np.isfinite(ranks), ranks, 0).astype(np.int64).tolist(),
                    }
                )
            trainer.step(window)
            if job.matrix:
                states.append(snapshot(trainer.model))
        matrix = None
        if job.matrix:
            model = build_model(config, job.variant.kind, job.experts).to(trainer.device)
            matrix = _test_all_windows(model, states, tasks, trainer)
        lines = [line for line in trainer.metrics if line["kind"] == "test"]
        cost = results.cost(trainer.metrics)
        experts = {name: side.num_experts for name, side in trainer.model.items.side_networks().items()}
    verdict = asdict(judge(lines))
    hit_rates = {
        scoring: {group: one["model"]["HR@10"] for group, one in groups.items() if one["targets"]}
        for scoring, groups in results.groups(lines).items()
    }
    return {
        "variant": job.variant.name,
        "seed": job.seed,
        "commit": job.commit,
        "key": job.key(),
        "experts": {} if job.variant.kind == "linear" else experts,
        "tests": tests,
        "groups": hit_rates,
        "verdict": {name: verdict[name] for name in ("verdict", "baseline", "difference", "standard_error")},
        "cost": None if cost is None else asdict(cost),
        "seconds": time.monotonic() - begin,
        "matrix": matrix,
    }


class LastLevel(ExpertBank):
    """A side level that returns the backbone's rows. With it the encoder is a projection of the last level.

    It has no trainable weights, counts nothing, and never grows.
    """

    def __init__(self, dim: int) -> None:
        # Levels with top_k are called as modules. The fused launch would compute a mixture.
        super().__init__(dim, rank=1, num_experts=1, top_k=1)
        self.requires_grad_(False)

    def forward(self, x: Tensor, backbone: Tensor, row_weight: Tensor | None = None) -> Tensor:
        return backbone


def build_model(config: RunConfig, kind: Kind, experts: Experts | None = None) -> Recommender:
    """Return a variant's model with the initial weights of the seed; "static" needs the number of `experts`."""
    model = config.build_model()
    with seeded(derive(config.stream.seed, 0, 0, "experts"), torch.device("cpu")):
        for name, side in model.items.side_networks().items():
            for level, bank in enumerate(side.levels()):
                if kind == "linear":
                    side.banks[level] = LastLevel(bank.dim)
                elif kind == "static":
                    assert experts is not None
                    side.banks[level] = ExpertBank(bank.dim, bank.rank, experts[name][level], bank.top_k)
    return model


@contextmanager
def _without_counting(model: Recommender) -> Iterator[None]:
    """Do not count utilization. Under protocol "paper" an evaluation counts, and the trainer prunes by the counts."""
    banks = [bank for _, _, bank in model.items.banks()]
    before = [bank.count_in_eval for bank in banks]
    try:
        for bank in banks:
            bank.count_in_eval = False
        yield
    finally:
        for bank, counted in zip(banks, before, strict=True):
            bank.count_in_eval = counted


def _test_all_windows(
    model: Recommender, states: list[dict[str, Tensor]], tasks: list[RankingTask], trainer: StreamingTrainer
) -> dict[str, list[list[float | None]]]:
    """Rank the test of every window with the model of every window."""
    tested = []
    _, conditions = split_state(trainer.model)
    for state in states:
        model.load_state_dict({**state, **conditions})
        tested.append([_means(rank_with_model(model, trainer.features, task, trainer.device)) for task in tasks])
    return {metric: [[means[metric] for means in row] for row in tested] for metric in METRICS}


def _means(ranks: np.ndarray) -> dict[str, float | None]:
    """Return the means of `METRICS`."""
    values = per_user(ranks)
    return {metric: mean(values[metric]) for metric in METRICS}


def mean(values: Sequence[Any] | np.ndarray) -> float | None:
    """Return the mean; None without values."""
    return float(np.mean(values)) if len(values) else None
