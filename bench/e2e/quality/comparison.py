"""A comparison of variants: data, runs in processes of their own, and summaries. Finished runs are not repeated."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any

import torch

from bench.e2e.quality.run import Job, Record, train_and_test
from bench.e2e.quality.streams import STREAMS, GeneratedStream, Source, generate
from bench.e2e.quality.summary import KIND, SCHEMA, summarize
from bench.e2e.quality.variants import BASE, GROWTH, QualityVariant
from xsmoe.atomic_files import replace_file
from xsmoe.cli.run_config import DEFAULT_WINDOWS

QUICK = {"windows": 4, "users": 60, "items": 100, "new_items": 10, "epochs": 3}
QUICK_REGIMES = 2


def compare(
    options: argparse.Namespace, variants: Sequence[QualityVariant], executor: Executor, machine: Mapping[str, Any]
) -> tuple[dict[str, Any], int, bool]:
    """Create the data, perform the unfinished runs, and summarize all runs.

    Args:
        options: the checked command line.
        variants: the base first.
        executor: creates data and performs runs.
        machine: from `bench.core.machine.describe`.

    Returns:
        The content of `--json`; the number of failed runs; whether Ctrl-C stopped the comparison.

    Raises:
        ValueError: the folder holds data or runs of other settings.
    """
    begin, seeds = time.monotonic(), list(range(1, options.seeds + 1))
    name, stream, sources = _sources(options, seeds, executor)
    runs = Runs(executor, lambda text: print(text, flush=True))
    jobs = [
        Job(
            variant=variant,
            seed=seed,
            source=sources[seed],
            settings={} if options.epochs is None else {"epochs": options.epochs},
            matrix=options.matrix,
            commit=machine["commit"],
            path=options.folder / "runs" / name / variant.name / f"{seed}.json",
        )
        for variant in variants
        for seed in seeds
    ]
    stopped = False
    try:
        runs.perform(jobs)
    except KeyboardInterrupt:
        stopped = True
        executor.shutdown(wait=False, cancel_futures=True)
    found = {
        "kind": KIND,
        "schema": SCHEMA,
        "command": options.given,
        "machine": dict(machine),
        "title": f"{name}, {len(seeds)} seeds",
        "stream": {"name": name, **stream},
        "seconds": time.monotonic() - begin,
        "variants": summarize(runs.records, shared=options.dataset is not None),
    }
    return found, runs.failures, stopped


class Runs:
    """Performs runs, and writes the record of each run to its file as soon as the run is finished.

    Args:
        executor: performs the runs.
        say: called with a line for each record and for each failure.

    Attributes:
        records: of all finished runs, including those of earlier calls of the command.
        failures: the number of runs that raised an exception.
    """

    def __init__(self, executor: Executor, say: Callable[[str], None]) -> None:
        self.executor, self.say = executor, say
        self.records: list[Record] = []
        self.failures = 0

    def perform(self, jobs: Sequence[Job]) -> None:
        """Perform all runs. Base and growth are first: static runs start with the experts of growth.

        Raises:
            ValueError: the file of a run has other settings.
        """
        self._perform(job for job in jobs if job.variant.name in (BASE, GROWTH))
        experts = {record["seed"]: record["experts"] for record in self.records if record["variant"] == GROWTH}
        rest = []
        for job in jobs:
            if job.variant.kind == "static" and job.seed in experts:
                rest.append(replace(job, experts=experts[job.seed]))
            elif job.variant.kind == "static":
                self._failed(job, "the run of this seed with growth, which determines the number of experts, failed")
            elif job.variant.name not in (BASE, GROWTH):
                rest.append(job)
        self._perform(rest)

    def _perform(self, jobs: Iterable[Job]) -> None:
        waiting = {}
        for job in jobs:
            if (record := finished(job)) is not None:
                self._add(job, record, "kept")
            else:
                waiting[self.executor.submit(train_and_test, job)] = job
        for future in as_completed(waiting):
            job = waiting[future]
            if (error := future.exception()) is None:
                record = future.result()
                job.path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(job.path, json.dumps(record).encode())
                self._add(job, record, "done")
            elif isinstance(error, Exception):
                self._failed(job, f"{type(error).__name__}: {error}")
            else:
                raise error

    def _add(self, job: Job, record: Record, how: str) -> None:
        self.records.append(record)
        hits = [0 < rank <= 10 for test in record["tests"] for rank in test["ranks"]]
        rate = f"HR@10 {100 * sum(hits) / len(hits):.2f} %" if hits else "no users were tested"
        self.say(f"- {job.variant.name}, seed {job.seed}: {rate}, {record['seconds']:.0f} s ({how})")

    def _failed(self, job: Job, reason: str) -> None:
        self.failures += 1
        self.say(f"- {job.variant.name}, seed {job.seed}: FAILED: {reason}")


def finished(job: Job) -> Record | None:
    """Return the record of a finished run; None if there is none, or if it lacks a requested matrix.

    Raises:
        ValueError: the file has a run of other settings or other data.
    """
    if not job.path.is_file():
        return None
    record: Record = json.loads(job.path.read_text())
    if record["key"] != job.key():
        raise ValueError(
            f"{job.path} holds a run of other settings or data; give another --folder, or remove the file to "
            "repeat the run"
        )
    return None if job.matrix and record["matrix"] is None else record


def processes(count: int) -> ProcessPoolExecutor:
    """Return an executor of `count` processes with one torch thread each.

    A process performs one run, so its peak memory is that of the run.
    """
    return ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), max_tasks_per_child=1, initializer=torch.set_num_threads, initargs=(1,)
    )


def _sources(
    options: argparse.Namespace, seeds: Sequence[int], executor: Executor
) -> tuple[str, dict[str, Any], dict[int, Source]]:
    """Return the stream's name, its parameters, and the data of each seed. Missing data are generated."""
    if options.dataset is not None:
        windows = options.windows or DEFAULT_WINDOWS
        source = Source(options.dataset.resolve(), options.store.resolve(), {"windows": windows})
        return options.dataset.resolve().name, {"windows": windows}, dict.fromkeys(seeds, source)
    stream = stream_of(options)
    name = f"{options.stream}-quick" if options.quick else options.stream
    made = [executor.submit(generate, name, stream, seed, options.folder / "data") for seed in seeds]
    return name, asdict(stream), {seed: future.result() for seed, future in zip(seeds, made, strict=True)}


def stream_of(options: argparse.Namespace) -> GeneratedStream:
    """Return the parameters of the generated stream."""
    stream = STREAMS[options.stream]
    if options.quick:
        stream = replace(stream, **QUICK, returning=QUICK_REGIMES if stream.returning else 0)
    return stream if options.windows is None else replace(stream, windows=options.windows)
