"""One case from inputs to rows: exact result, correctness check, interleaved times."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from bench.core import bound
from bench.core.benchmark import Benchmark, Implementation, InputSets, Variant, dtype_name, gradients
from bench.core.correctness import Checked, Truth, check, skipped
from bench.core.memory import OutOfMemory, named, release, try_run
from bench.core.results import Case, Row, Timing
from bench.core.timing import Samples, Say, Stopwatch, Task, flusher, interleave, quantiles, ratios

# Rounds that are not counted. On a GPU torch.compile records its graphs in the second one.
WARM_UP, CUDA_WARM_UP = 1, 3


def create(
    kind: type[Benchmark], sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Benchmark | None, str]:
    """Return a benchmark with its weights, or None and the reason if they do not fit into memory."""
    return try_run(lambda: kind(dict(sizes), dtype, device, seed), device)


def without_inputs(
    kind: type[Benchmark],
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    reason: str,
) -> Case:
    """Return the case of a benchmark whose weights do not fit into memory; all its rows are skipped."""
    variants = kind.smallest(dtype, device).select(names)
    rows = [skipped(variant, f"the inputs: {reason}").row for variant in variants]
    return Case(
        kind.operator, "inputs that do not fit into memory", dict(sizes), dtype_name(dtype), device.type,
        flop_rate=0.0, byte_rate=0.0, flop={}, bytes={}, rounds=0, rows=rows,
    )  # fmt: skip


def untimed(benchmark: Benchmark, rows: list[Row]) -> Case:
    """Return the case of rows without times."""
    return Case(
        benchmark.operator, benchmark.title, dict(benchmark.sizes), dtype_name(benchmark.dtype), benchmark.device.type,
        flop_rate=0.0, byte_rate=0.0, flop={}, bytes={}, rounds=0, rows=rows,
    )  # fmt: skip


def measure(
    benchmark: Benchmark,
    names: Sequence[str],
    against: Sequence[str],
    *,
    seconds: float,
    say: Say = lambda _: None,
) -> Case:
    """Check the variants and time those that are right.

    Args:
        benchmark: the operator at one size.
        names: variants, in the order of their rows.
        against: names of the baselines among them.
        seconds: for the timed rounds.
        say: called with what happens next.
    """
    torch._dynamo.reset()
    if benchmark.on_cuda:
        torch.cuda.empty_cache()
    inputs, checked = check_all(benchmark, names, say=say)
    running = {name: one for name, one in checked.items() if one.row.status == "measured"}
    work, rates, samples = benchmark.work(), bound.Rates(0.0, 0.0), Samples()
    if inputs and running:
        tasks = {
            name: _timed(benchmark, one.variant, one.implementation, inputs)
            for name, one in running.items()
            if one.implementation
        }

        def drop(name: str, reason: str) -> None:
            # No reference to the variant may remain, or its memory stays allocated.
            if one := running.pop(name, None):
                checked[name] = skipped(one.variant, reason)

        samples = _rounds(benchmark, tasks, drop, seconds, say)
        rates = bound.rates(samples, benchmark.products(), benchmark.dtype, benchmark.device)
    rows = []
    for name, one in checked.items():
        passes = {}
        if name in running:
            # A compiled variant or a graph executes the products of another variant.
            like = checked.get(one.variant.flop_like)
            flop = one.flop or (like.flop if like else None)
            baselines = [
                other for other in against if other in running and checked[other].row.problem == one.row.problem
            ]
            passes = _timings(samples, name, baselines, benchmark, rates, flop)
        rows.append(replace(one.row, passes=passes))
    return replace(
        untimed(benchmark, rows),
        flop_rate=rates.flop,
        byte_rate=rates.bytes,
        flop={name: least.flop for name, least in work.items()},
        bytes={name: least.bytes for name, least in work.items()},
        rounds=max((len(laps) for laps in samples.values()), default=0),
    )


def check_all(
    benchmark: Benchmark, names: Sequence[str], sets: int | None = None, say: Say = lambda _: None
) -> tuple[InputSets | None, dict[str, Checked]]:
    """Return the inputs, and each variant after its correctness check; all are skipped if the inputs do not fit."""
    say("inputs and exact result")
    drawn, reason = try_run(lambda: inputs_and_truth(benchmark, sets), benchmark.device)
    checked = {}
    for variant in benchmark.select(names):
        say(f"{'compiling and ' if variant.compiled else ''}checking {variant.name}")
        exact = f"the exact result: {reason}"
        checked[variant.name] = check(benchmark, variant, *drawn) if drawn else skipped(variant, exact)
    return drawn[0] if drawn else None, checked


def inputs_and_truth(benchmark: Benchmark, sets: int | None = None) -> tuple[InputSets, Truth]:
    """Return inputs, and the right results of the first set."""
    inputs = InputSets(benchmark, sets)
    return inputs, Truth(benchmark, inputs.get(0))


def _rounds(
    benchmark: Benchmark, tasks: dict[str, Task], drop: Callable[[str, str], None], seconds: float, say: Say
) -> Samples:
    """Return timed rounds of variants and probes.

    If a task runs out of memory, it is removed from `tasks`, `drop` gets its name and the reason, and the rounds start
    again.
    """
    device = benchmark.device
    probes, _ = try_run(lambda: bound.probes(benchmark.products(), benchmark.dtype, device), device)
    tasks |= probes or {}
    warm_up = CUDA_WARM_UP if device.type == "cuda" else WARM_UP
    while tasks:
        wrapped = {name: named(name, task) for name, task in tasks.items()}
        try:
            # Each case compiles once, in the correctness check. A recompilation in a timed round would look slow.
            with torch.compiler.set_stance("fail_on_recompile"):
                return interleave(wrapped, seconds=seconds, warm_up=warm_up, seed=benchmark.seed, say=say)
        except OutOfMemory as error:
            name, reason = error.name, error.reason
        del tasks[name], wrapped
        drop(name, reason)
        release(device)
    return {}


def _timed(benchmark: Benchmark, variant: Variant, built: Implementation, inputs: InputSets) -> Task:
    """Return one round of a variant: forward, then backward if there is one; or a whole step."""
    flush = flusher(benchmark.device)

    def task(turn: int) -> tuple[float, ...]:
        mine = inputs.get(turn, variant.dtype)
        if built.prepare is not None:
            mine = built.prepare(mine)
        flush()
        backward = bool(built.leaves(mine))
        watch = Stopwatch(benchmark.device)
        if whole := built.whole_step or built.step:
            whole(mine)
            watch.mark()
            return watch.laps()
        results = built.forward(mine)
        watch.mark()
        if backward:
            gradients(built, mine, results)
            watch.mark()
        return watch.laps()

    return task


def _timings(
    samples: Samples,
    name: str,
    against: Sequence[str],
    benchmark: Benchmark,
    rates: bound.Rates,
    flop: Mapping[str, float] | None,
) -> dict[str, Timing]:
    """Return the timing of each pass of a variant."""
    work = dict(benchmark.work())
    laps = {one: _passes(samples[one], list(work)) for one in {name, *against}}
    flop = dict(flop) if flop else None
    if len(work) > 1:
        work["both"] = bound.total(work)
        if flop:
            flop["both"] = sum(flop.values())
    found = {}
    for one, least in work.items():
        if one not in laps[name]:
            continue
        mine = laps[name][one]
        speedups: dict[str, tuple[float, float, float]] = {
            other: ratios(mine, laps[other][one]) for other in against if one in laps[other]
        }
        middle, least_seconds = quantiles(mine), bound.seconds(least, rates)
        found[one] = Timing(
            *middle,
            samples=mine,
            against=speedups,
            bound=least_seconds,
            of_bound=least_seconds / middle.median,
            flop=(flop[one] or None) if flop else None,
        )
    return found


def _passes(rounds: Sequence[tuple[float, ...]], names: Sequence[str]) -> dict[str, list[float]]:
    if len(names) > 1 and len(rounds[0]) == 1:
        return {"both": [lap for (lap,) in rounds]}
    passes = {name: [laps[place] for laps in rounds] for place, name in enumerate(names)}
    return passes | ({"both": [sum(laps) for laps in rounds]} if len(names) > 1 else {})
