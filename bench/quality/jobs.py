"""Runs in processes of their own, of which finished ones are kept and not run again."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context

import torch

from bench.quality.run import Job, Record, perform
from bench.quality.variants import BASE, GROWTH
from xsmoe.atomic_files import replace_file

Say = Callable[[str], None]


class Jobs:
    """Performs runs, and keeps the record of each one in a file as soon as it is done.

    Args:
        executor: where runs are performed.
        say: called with a line for every record, and for every run that failed.

    Attributes:
        records: those that are done, those of earlier calls of the command among them.
        failures: how many runs raised.
    """

    def __init__(self, executor: Executor, say: Say) -> None:
        self.executor, self.say = executor, say
        self.records: list[Record] = []
        self.failures = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """Perform all runs, first those of the base and those with growth, whose experts static ones begin with.

        Raises:
            ValueError: the file of a run holds one of other settings.
        """
        self._all(job for job in jobs if job.variant.name in (BASE, GROWTH))
        ended = {record["seed"]: record["experts"] for record in self.records if record["variant"] == GROWTH}
        rest = []
        for job in jobs:
            if job.variant.kind == "static" and job.seed in ended:
                rest.append(replace(job, experts=ended[job.seed]))
            elif job.variant.kind == "static":
                self._failed(job, "the run of this seed with growth, which says how many experts to take, failed")
            elif job.variant.name not in (BASE, GROWTH):
                rest.append(job)
        self._all(rest)

    def _all(self, jobs: Iterable[Job]) -> None:
        waiting = {}
        for job in jobs:
            if (record := kept(job)) is not None:
                self._done(job, record, "kept")
            else:
                waiting[self.executor.submit(perform, job)] = job
        for future in as_completed(waiting):
            job = waiting[future]
            if (error := future.exception()) is None:
                record = future.result()
                job.path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(job.path, json.dumps(record).encode())
                self._done(job, record, "done")
            elif isinstance(error, Exception):
                self._failed(job, f"{type(error).__name__}: {error}")
            else:
                raise error

    def _done(self, job: Job, record: Record, how: str) -> None:
        self.records.append(record)
        hits = [hit for test in record["tests"] for hit in (0 < rank <= 10 for rank in test["ranks"])]
        rate = f"HR@10 {100 * sum(hits) / len(hits):.2f} %" if hits else "nobody was tested"
        self.say(f"- {job.variant.name}, seed {job.seed}: {rate}, {record['seconds']:.0f} s ({how})")

    def _failed(self, job: Job, reason: str) -> None:
        self.failures += 1
        self.say(f"- {job.variant.name}, seed {job.seed}: FAILED: {reason}")


def kept(job: Job) -> Record | None:
    """Return the record of a run that is done; None where there is none, or it lacks a matrix that is asked for.

    Raises:
        ValueError: the file holds a run of other settings or other data.
    """
    if not job.path.is_file():
        return None
    record: Record = json.loads(job.path.read_text())
    if record["key"] != job.key():
        raise ValueError(
            f"{job.path} holds a run of other settings or data; give another --folder, or remove the file to "
            "run it again"
        )
    return None if job.matrix and record["matrix"] is None else record


def processes(count: int) -> ProcessPoolExecutor:
    """Return an executor of so many processes with one torch thread each.

    A process performs one run, so that its peak memory is the run's.
    """
    return ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), max_tasks_per_child=1, initializer=torch.set_num_threads, initargs=(1,)
    )
