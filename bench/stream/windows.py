"""The stream, window by window: all runs take an epoch in turn, so that what disturbs one disturbs all."""

import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.steps.our_step import NotCaptured
from bench.stream.check import Check
from bench.stream.published_run import PublishedRun
from bench.stream.records import RunRecord, WindowRecord
from bench.stream.runs import GateRows, OurRun, Run
from bench.stream.settings import Settings, names
from bench.stream.streams import Drawn
from xsmoe.data import Sequences, WindowSplits, item_share
from xsmoe.stream.evaluation.baselines import places
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_popularity
from xsmoe.stream.evaluation.metrics import per_user, summarize
from xsmoe.stream.evaluation.seen_items import StreamMemory
from xsmoe.stream.state.seeds import derive

Say = Callable[[str], None]


class Streaming:
    """All runs and what they have in common.

    Args:
        settings: of the stream.
        drawn: the stream.
        say: told what goes on.
    """

    def __init__(self, settings: Settings, drawn: Drawn, say: Say = lambda _: None) -> None:
        self.settings, self.drawn, self.config, self._say = settings, drawn, settings.config(), say
        self.device = torch.device(settings.device)
        _, *mine = names(settings)
        ours = [OurRun(name, settings, drawn, top_k) for name, top_k in zip(mine, (None, settings.top_k), strict=False)]
        weights = {name: value.cpu() for name, value in ours[0].model.state_dict().items()}
        self.runs: list[Run] = [PublishedRun(settings, drawn, weights), *ours]
        # The first optimizer of a process imports for seconds.
        torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        self._memory, self._shuffle = StreamMemory(), random.Random(settings.seed).shuffle

    def windows(self) -> Iterator[WindowRecord]:
        """Trains and tests window by window. A run whose step is wrong is dropped; without one of ours it is over."""
        for number in range(len(self.drawn.windows)):
            yield self._window(number)
            if not self._ours():
                return

    def _window(self, number: int) -> WindowRecord:
        splits = self.config.split(self.drawn.windows[number])
        self._memory.add_training(splits)
        share = item_share(splits.train, self.drawn.features.num_items)
        spent = self._grow(number, splits.train, share)
        order = np.random.default_rng(derive(self.config.seed, number, 0, "order")).permutation(len(splits.train))
        batch = splits.train.take(order[: self.config.batch_size])
        (experts,) = {bank.num_experts for run in self._ours() for _, _, bank in run.model.items.banks()}
        found = self._check(number, batch, share)
        refused = {name: record for name, record in found.items() if record.refused}
        self.runs = [run for run in self.runs if run.name not in refused]
        if self._ours():
            self._train(number, found)
        self._memory.add_rest(splits)
        for run in self.runs:
            found[run.name] = replace(
                found[run.name],
                grow=spent[run.name],
                rows=run.encoded_rows(batch),
                weight_bytes=run.weight_bytes(),
                optimizer_bytes=run.optimizer_bytes(),
            )
        candidates, popularity = 0, None
        if number + 1 < len(self.drawn.windows) and self._ours():
            candidates, popularity = self._test(number, self.config.split(self.drawn.windows[number + 1]), found)
        batches = -(-len(order) // self.config.batch_size)
        return WindowRecord(number, experts, len(order), batches, candidates, popularity, found)

    def _ours(self) -> list[OurRun]:
        return [run for run in self.runs if isinstance(run, OurRun)]

    def _grow(self, number: int, sequences: Sequences, share: np.ndarray) -> dict[str, float]:
        spent: dict[str, float] = {}
        rows: GateRows | None = None
        # Ours first: the published formulation takes the gate rows that ours drew.
        for run in sorted(self.runs, key=lambda run: not isinstance(run, OurRun)):
            begin = self._now()
            if number > 0:
                rows = run.grow(number, rows)
            run.begin(sequences, share)
            spent[run.name] = self._now() - begin
        return spent

    def _check(self, number: int, batch: Sequences, share: np.ndarray) -> dict[str, RunRecord]:
        check = Check(self.settings, self.drawn, batch, share)
        found = {}
        for run in self.runs:
            self._say(f"window {number}: {run.name}, gate and memory of a step")
            if isinstance(run, OurRun):
                verdict, peak = check.ours(run)
                found[run.name] = RunRecord(verdict.refused, verdict.ratio, verdict.worst, peak_bytes=peak)
            else:
                found[run.name] = RunRecord(peak_bytes=check.published_peak(self._ours()[0]))
        return found

    def _train(self, number: int, found: dict[str, RunRecord]) -> None:
        for epoch in range(self.settings.epochs):
            for run in self._shuffled():
                self._say(f"window {number}: {run.name}, epoch {epoch}")
                gc.collect()
                gc.disable()
                try:
                    begin = self._now()
                    with run.clock.epoch() as steps:
                        loss = run.epoch(number, epoch)
                    spent = self._now() - begin
                except NotCaptured as error:
                    found[run.name] = replace(found[run.name], refused=str(error))
                    self.runs.remove(run)
                    continue
                finally:
                    gc.enable()
                record = found[run.name]
                record.steps.extend(steps)
                record.epochs.append(spent)
                record.losses.append(loss)

    def _test(self, number: int, splits: WindowSplits, found: dict[str, RunRecord]) -> tuple[int, dict[str, Any]]:
        task = RankingTask.build(splits.test, self._memory.known_with(splits), self._memory.history, "miss")
        scores = {}
        if number == 0:
            # Not the first of its kind in this process.
            for run in self.runs:
                run.ranks(task.chunk(0, 1))
        for run in self._shuffled():
            self._say(f"window {number}: {run.name}, test on {len(task)} users and {len(task.candidates)} items")
            begin = self._now()
            ranks = run.ranks(task)
            spent = self._now() - begin
            scores[run.name] = per_user(ranks)
            found[run.name] = replace(found[run.name], test=spent, test_scores=summarize(scores[run.name]))
        for name, mine in scores.items():
            if name != "published":
                less = {metric: mine[metric] - theirs for metric, theirs in scores["published"].items()}
                found[name] = replace(found[name], difference=summarize(less))
        counts = self._memory.popularity(task.candidates)["all_time"]
        return len(task.candidates), summarize(per_user(rank_with_popularity(places(counts, task.candidates), task)))

    def _shuffled(self) -> list[Run]:
        runs = list(self.runs)
        self._shuffle(runs)
        return runs

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
