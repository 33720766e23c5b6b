"""The stream, window by window. The runs train one epoch each in turn, so that a disturbance affects all of them."""

import gc
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.core.timing import Say
from bench.e2e.step.our_step import CaptureFailed
from bench.e2e.stream.check import WindowCheck
from bench.e2e.stream.data import StreamData
from bench.e2e.stream.paper_run import PaperRun
from bench.e2e.stream.records import RunRecord, WindowRecord
from bench.e2e.stream.runs import GateRows, OurRun, Run
from bench.e2e.stream.settings import Settings
from xsmoe.data import Sequences, WindowSplits, item_share
from xsmoe.stream.evaluation.baselines import places
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_popularity
from xsmoe.stream.evaluation.metrics import per_user, summarize
from xsmoe.stream.evaluation.seen_items import SeenItemHistory
from xsmoe.stream.state.seeds import derive


class StreamBenchmark:
    """All runs and their common state.

    Args:
        settings: of the stream.
        data: the stream.
        say: called with what happens next.
    """

    def __init__(self, settings: Settings, data: StreamData, say: Say = lambda _: None) -> None:
        self.settings, self.data, self.config, self._say = settings, data, settings.config(), say
        self.device = torch.device(settings.device)
        _, *names = settings.names
        ours = [OurRun(name, settings, data, top_k) for name, top_k in zip(names, (None, settings.top_k), strict=False)]
        weights = {name: value.cpu() for name, value in ours[0].model.state_dict().items()}
        self.runs: list[Run] = [PaperRun(settings, data, weights), *ours]
        # The first optimizer of a process imports modules, which takes seconds.
        torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        self._seen, self._shuffle = SeenItemHistory(), random.Random(settings.seed).shuffle

    def windows(self) -> Iterator[WindowRecord]:
        """Train and test window by window. A run with a wrong step is dropped; the stream ends without our runs."""
        for number in range(len(self.data.windows)):
            yield self._window(number)
            if not self._our_runs():
                return

    def _window(self, number: int) -> WindowRecord:
        splits = self.config.split(self.data.windows[number])
        self._seen.add_training(splits)
        share = item_share(splits.train, self.data.features.num_items)
        growth_seconds = self._grow(number, splits.train, share)
        order = np.random.default_rng(derive(self.config.seed, number, 0, "order")).permutation(len(splits.train))
        batch = splits.train.take(order[: self.config.batch_size])
        (experts,) = {bank.num_experts for run in self._our_runs() for _, _, bank in run.model.items.banks()}
        found = self._check(number, batch, share)
        self.runs = [run for run in self.runs if not found[run.name].refused]
        if self._our_runs():
            self._train(number, found)
        self._seen.add_validation(splits)
        for run in self.runs:
            found[run.name] = replace(
                found[run.name],
                grow=growth_seconds[run.name],
                rows=run.encoded_rows(batch),
                weight_bytes=run.weight_bytes(),
                optimizer_bytes=run.optimizer_bytes(),
            )
        candidates, popularity = 0, None
        if number + 1 < len(self.data.windows) and self._our_runs():
            candidates, popularity = self._test(number, self.config.split(self.data.windows[number + 1]), found)
        batches = -(-len(order) // self.config.batch_size)
        return WindowRecord(number, experts, len(order), batches, candidates, popularity, found)

    def _our_runs(self) -> list[OurRun]:
        return [run for run in self.runs if isinstance(run, OurRun)]

    def _grow(self, number: int, sequences: Sequences, share: np.ndarray) -> dict[str, float]:
        """Expand all runs and prepare them for the window; return their seconds."""
        seconds: dict[str, float] = {}
        rows: GateRows | None = None
        # Ours first: the paper's formulation gets the gate rows that ours drew.
        for run in sorted(self.runs, key=lambda run: not isinstance(run, OurRun)):
            begin = self._now()
            if number > 0:
                rows = run.grow(number, rows)
            run.begin(sequences, share)
            seconds[run.name] = self._now() - begin
        return seconds

    def _check(self, number: int, batch: Sequences, share: np.ndarray) -> dict[str, RunRecord]:
        check = WindowCheck(self.settings, self.data, batch, share)
        found = {}
        for run in self.runs:
            self._say(f"window {number}: {run.name}, correctness and memory of a step")
            if isinstance(run, OurRun):
                verdict, peak = check.check(run)
                found[run.name] = RunRecord(verdict.refused, verdict.ratio, verdict.worst, peak_bytes=peak)
            else:
                found[run.name] = RunRecord(peak_bytes=check.paper_peak(self._our_runs()[0]))
        return found

    def _train(self, number: int, found: dict[str, RunRecord]) -> None:
        for epoch in range(self.settings.epochs):
            for run in self._in_random_order():
                self._say(f"window {number}: {run.name}, epoch {epoch}")
                gc.collect()
                gc.disable()
                try:
                    begin = self._now()
                    with run.clock.epoch() as steps:
                        loss = run.epoch(number, epoch)
                    seconds = self._now() - begin
                except CaptureFailed as error:
                    found[run.name] = replace(found[run.name], refused=str(error))
                    self.runs.remove(run)
                    continue
                finally:
                    gc.enable()
                record = found[run.name]
                record.steps.extend(steps)
                record.epochs.append(seconds)
                record.losses.append(loss)

    def _test(self, number: int, splits: WindowSplits, found: dict[str, RunRecord]) -> tuple[int, dict[str, Any]]:
        """Rank the targets of the next window; return the number of candidates and the scores of popularity."""
        task = RankingTask.build(splits.test, self._seen.known_with(splits), self._seen.history, "miss")
        scores = {}
        if number == 0:
            # The first ranking of a process is slower, so it is not timed.
            for run in self.runs:
                run.ranks(task.chunk(0, 1))
        for run in self._in_random_order():
            self._say(f"window {number}: {run.name}, test on {len(task)} users and {len(task.candidates)} items")
            begin = self._now()
            ranks = run.ranks(task)
            seconds = self._now() - begin
            scores[run.name] = per_user(ranks)
            found[run.name] = replace(found[run.name], test=seconds, test_scores=summarize(scores[run.name]))
        for name, mine in scores.items():
            if name != "published":
                difference = {metric: mine[metric] - theirs for metric, theirs in scores["published"].items()}
                found[name] = replace(found[name], difference=summarize(difference))
        counts = self._seen.popularity(task.candidates)["all_time"]
        return len(task.candidates), summarize(per_user(rank_with_popularity(places(counts, task.candidates), task)))

    def _in_random_order(self) -> list[Run]:
        runs = list(self.runs)
        self._shuffle(runs)
        return runs

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
