"""One case from beginning to end: exact result, gate, interleaved times."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from bench import floor, standing
from bench.examine import Checked, Truth, examine, too_large
from bench.measure import Samples, Say, Stopwatch, Task, flusher, interleave, quantiles, ratios
from bench.results import Case, Row, Timing
from bench.rows import Rows
from bench.shortage import OutOfMemory, fitting, named, release
from bench.workload import Variant, Workload, gradients

# Rounds that are not counted; on a GPU torch.compile's graphs are recorded in the second.
WARM_UP, CUDA_WARM_UP = 1, 3


def drawn(
    kind: type[Workload], sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Workload | None, str]:
    """A workload with its weights, or None and what was said where memory does not suffice for them."""
    return fitting(lambda: kind(dict(sizes), dtype, device, seed), device)


def without_inputs(
    kind: type[Workload],
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    reason: str,
) -> Case:
    """The case of a workload for whose inputs memory does not suffice: all rows are skipped."""
    rows = [too_large(name, f"the inputs: {reason}").row for name in names]
    return untimed(kind, "inputs that do not fit into memory", sizes, dtype, device, rows)


def untimed(
    kind: type[Workload] | Workload,
    title: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    rows: list[Row],
) -> Case:
    """The case of rows that have no times."""
    return Case(
        operator=kind.operator,
        title=title,
        sizes=dict(sizes),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        flop_rate=0.0,
        byte_rate=0.0,
        flop={},
        bytes={},
        rounds=0,
        rows=rows,
    )


def measure(
    workload: Workload,
    names: Sequence[str],
    against: Sequence[str],
    *,
    seconds: float,
    say: Say = lambda _: None,
) -> Case:
    """Measures the variants of those names, of which those that are right get times.

    Args:
        workload: what is measured.
        names: variants, in the order of their rows.
        against: the baselines among them.
        seconds: for the timed rounds.
        say: told what goes on.
    """
    torch._dynamo.reset()
    if workload.device.type == "cuda":
        torch.cuda.empty_cache()
    say("inputs and exact result")
    inputs, reason = fitting(lambda: rows_and_truth(workload), workload.device)
    checked: dict[str, Checked] = {}
    for name in names:
        say(checking(name))
        checked[name] = examine(workload, name, *inputs) if inputs else too_large(name, f"the exact result: {reason}")
    running = {name: found.variant for name, found in checked.items() if found.row.status == "measured"}
    work, rates, samples = workload.work(), floor.Rates(0.0, 0.0), Samples()
    if inputs and running:
        tasks = {name: timed(workload, variant, inputs[0]) for name, variant in running.items() if variant}

        def drop(name: str, reason: str) -> None:
            # Nothing may hold the variant from here on, or its memory stays taken.
            if running.pop(name, None):
                checked[name] = too_large(name, reason)

        samples = rounds(workload, tasks, drop, seconds, say)
        rates = floor.rates(samples, workload.products(), workload.dtype, workload.device)
    counted = {name: found.flop for name, found in checked.items()}
    finished = []
    for name, found in checked.items():
        passes = {}
        if name in running and found.variant:
            flop = counted[name] or counted.get(found.variant.like)
            rivals = [one for one in against if one in running and _alike(checked[one], found)]
            passes = timings(samples, name, rivals, workload, rates, flop)
        finished.append(replace(found.row, passes=passes))
    return replace(
        untimed(workload, workload.title, workload.sizes, workload.dtype, workload.device, finished),
        flop_rate=rates.flop,
        byte_rate=rates.bytes,
        flop={name: least.flop for name, least in work.items()},
        bytes={name: least.bytes for name, least in work.items()},
        rounds=max((len(laps) for laps in samples.values()), default=0),
    )


def _alike(one: Checked, other: Checked) -> bool:
    """Whether two variants solve the same problem."""
    return standing.problem(one.row) == standing.problem(other.row)


def checking(name: str) -> str:
    """What is said while a variant is at the gate, where torch.compile may take its minutes."""
    return f"{'compiling and ' if name.startswith('compiled') else ''}checking {name}"


def rounds(
    workload: Workload,
    tasks: dict[str, Task],
    drop: Callable[[str, str], None],
    seconds: float,
    say: Say = lambda _: None,
) -> Samples:
    """Timed rounds of variants and probes; a task for which memory does not suffice is dropped, and all begin anew.

    `tasks` loses those, and `drop` is told their names and what was said.
    """
    device = workload.device
    probes, _ = fitting(lambda: floor.probes(workload.products(), workload.dtype, device), device)
    tasks |= probes or {}
    warm_up = CUDA_WARM_UP if device.type == "cuda" else WARM_UP
    while tasks:
        wrapped = {name: named(name, task) for name, task in tasks.items()}
        try:
            # Compiled once per case, in the gate; a second time inside a timed round would pass for slowness.
            with torch.compiler.set_stance("fail_on_recompile"):
                return interleave(wrapped, seconds=seconds, warm_up=warm_up, seed=workload.seed, say=say)
        except OutOfMemory as error:
            name, reason = error.name, error.reason
        del tasks[name], wrapped
        drop(name, reason)
        release(device)
    return {}


def rows_and_truth(workload: Workload, sets: int | None = None) -> tuple[Rows, Truth]:
    """Rows to run variants on, and what is right to give on them."""
    rows = Rows(workload, sets)
    return rows, Truth(workload, rows.get(0, None))


def timed(workload: Workload, variant: Variant, rows: Rows) -> Task:
    """One round of a variant: forward, then backward if there is one; or both at once."""
    flush = flusher(workload.device)

    def task(turn: int) -> tuple[float, ...]:
        taken = rows.get(turn, variant.dtype)
        if variant.prepare is not None:
            taken = variant.prepare(taken)
        flush()
        backward = bool(variant.leaves(taken))
        watch = Stopwatch(workload.device)
        if whole := variant.whole or variant.step:
            whole(taken)
            watch.mark()
            return watch.laps()
        results = variant.forward(taken)
        watch.mark()
        if backward:
            gradients(variant, taken, results)
            watch.mark()
        return watch.laps()

    return task


def timings(
    samples: Samples,
    name: str,
    against: Sequence[str],
    workload: Workload,
    rates: floor.Rates,
    flop: Mapping[str, float] | None,
) -> dict[str, Timing]:
    """What the rounds say about each pass of a variant."""
    work = dict(workload.work())
    laps = {one: _passes(samples[one], list(work)) for one in {name, *against}}
    flop = dict(flop) if flop else None
    if len(work) > 1:
        work["both"] = floor.total(work)
        if flop:
            flop["both"] = sum(flop.values())
    found = {}
    for one, least in work.items():
        if one not in laps[name]:
            continue
        mine = laps[name][one]
        faster: dict[str, tuple[float, float, float]] = {
            rival: ratios(mine, laps[rival][one]) for rival in against if one in laps[rival]
        }
        middle, floor_seconds = quantiles(mine), floor.seconds(least, rates)
        found[one] = Timing(
            *middle,
            samples=mine,
            against=faster,
            floor=floor_seconds,
            share=floor_seconds / middle.median,
            flop=(flop[one] or None) if flop else None,
        )
    return found


def _passes(rounds: Sequence[tuple[float, ...]], names: Sequence[str]) -> dict[str, list[float]]:
    if len(names) > 1 and len(rounds[0]) == 1:
        return {"both": [lap for (lap,) in rounds]}
    passes = {name: [laps[place] for laps in rounds] for place, name in enumerate(names)}
    return passes | ({"both": [sum(laps) for laps in rounds]} if len(names) > 1 else {})
