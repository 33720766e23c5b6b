"""One comparison from data to summaries: what is made, what is run, and what came of it."""

import argparse
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace
from typing import Any

from bench.quality.jobs import Jobs, processes
from bench.quality.presets import PRESETS, Preset
from bench.quality.run import Job
from bench.quality.sources import Source, generated
from bench.quality.summary import KIND, SCHEMA, summarize
from bench.quality.variants import Variant
from xsmoe.cli.run_config import DEFAULT_WINDOWS

__all__ = ["compare", "processes"]

QUICK = {"windows": 4, "users": 60, "items": 100, "new_items": 10, "epochs": 3}
QUICK_REGIMES = 2


def compare(
    options: argparse.Namespace, variants: Sequence[Variant], executor: Executor, machine: Mapping[str, Any]
) -> tuple[dict[str, Any], int, bool]:
    """Make the data, run what is not done yet, and summarize all of it.

    Args:
        options: of the command line, checked.
        variants: the base first.
        executor: where data are made and runs performed.
        machine: what `bench.machine.describe` says.

    Returns:
        What `--json` writes; how many runs failed; and whether Ctrl-C stopped it.

    Raises:
        ValueError: the folder holds data or runs of other settings.
    """
    begin, seeds = time.monotonic(), list(range(1, options.seeds + 1))
    name, stream, sources = _sources(options, seeds, executor)
    jobs = Jobs(executor, lambda text: print(text, flush=True))
    given = {"epochs": options.epochs} if options.epochs is not None else {}
    wanted = [
        Job(
            variant=variant,
            seed=seed,
            source=sources[seed],
            settings=given,
            matrix=options.matrix,
            commit=machine["commit"],
            path=options.folder / "runs" / name / variant.name / f"{seed}.json",
        )
        for variant in variants
        for seed in seeds
    ]
    stopped = False
    try:
        jobs.run(wanted)
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
        "variants": summarize(jobs.records, shared=options.dataset is not None),
    }
    return found, jobs.failures, stopped


def _sources(
    options: argparse.Namespace, seeds: Sequence[int], executor: Executor
) -> tuple[str, dict[str, Any], dict[int, Source]]:
    """Return the stream's name, its parameters, and the data of each seed, made where they are not there yet."""
    if options.dataset is not None:
        windows = options.windows or DEFAULT_WINDOWS
        source = Source(options.dataset.resolve(), options.store.resolve(), {"windows": windows}, shared=True)
        return options.dataset.resolve().name, {"windows": windows}, dict.fromkeys(seeds, source)
    preset = _preset(options)
    name = f"{options.stream}-quick" if options.quick else options.stream
    folder = options.folder / "data"
    made = [executor.submit(generated, name, preset, seed, folder) for seed in seeds]
    return name, asdict(preset), {seed: future.result() for seed, future in zip(seeds, made, strict=True)}


def _preset(options: argparse.Namespace) -> Preset:
    preset = PRESETS[options.stream]
    if options.quick:
        preset = replace(preset, **QUICK, returning=QUICK_REGIMES if preset.returning else 0)
    return preset if options.windows is None else replace(preset, windows=options.windows)
