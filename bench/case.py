"""One case from beginning to end: exact result, gate, saved bytes, interleaved times."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import floor, gate, graph, machine
from bench.measure import Samples, Stopwatch, Task, flusher, interleave, quantiles
from bench.memory import OutOfMemory, first_line, fitting, named, release
from bench.peak import Peak, measure_peak
from bench.results import Case, Row, Timing
from bench.saved import count_saved
from bench.workload import Absent, Tensors, Variant, Workload, gradients
from xsmoe_kernels import dispatch

# Rows are rotated through this much memory, so that no round finds the last one's in a cache of its own.
ROTATED_BYTES = 128 << 20
MOST_SETS = 16
# Memory that a variant may take of what is free.
MEMORY_SHARE = 0.8
# Rounds that are not counted; on a GPU torch.compile's graphs are recorded in the second.
WARM_UP, CUDA_WARM_UP = 1, 3

Say = Callable[[str], None]


class _Unrecordable(RuntimeError):
    """A step that a CUDA graph cannot hold."""


class _Ran(NamedTuple):
    """What a run gave, and what was counted meanwhile."""

    found: Tensors
    flop: Mapping[str, float] | None
    saved_bytes: int | None = None
    compile_seconds: float | None = None


@dataclass(frozen=True)
class Checked:
    """A variant that came to the gate, what it found, and what was counted on the way."""

    variant: Variant | None
    row: Row
    flop: Mapping[str, float] | None


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
    say("exact result")
    drawn, reason = fitting(lambda: _draw(workload), workload.device)
    checked: dict[str, Checked] = {}
    for name in names:
        say(f"{name}: gate")
        checked[name] = examine(workload, name, *drawn) if drawn else _too_large(name, f"the exact result: {reason}")
    running = {name: found.variant for name, found in checked.items() if found.row.status == "measured"}
    work, rates, samples = workload.work(), floor.Rates(0.0, 0.0), Samples()
    if drawn and running:
        say(f"timing {', '.join(running)}")
        tasks = {name: timed(workload, variant, drawn[0]) for name, variant in running.items() if variant}

        def drop(name: str, reason: str) -> None:
            # Nothing may hold the variant from here on, or its memory stays taken.
            if running.pop(name, None):
                checked[name] = _too_large(name, reason)

        samples = rounds(workload, tasks, drop, seconds)
        rates = floor.rates(samples, workload.products(), workload.dtype, workload.device)
    counted = {name: found.flop for name, found in checked.items()}
    finished = []
    for name, found in checked.items():
        passes = {}
        if name in running and found.variant:
            flop = counted[name] or counted.get(found.variant.like)
            passes = timings(samples, name, [one for one in against if one in running], workload, rates, flop)
        finished.append(replace(found.row, passes=passes))
    return Case(
        operator=workload.operator,
        title=workload.title,
        sizes=workload.sizes,
        dtype=str(workload.dtype).removeprefix("torch."),
        device=workload.device.type,
        flop_rate=rates.flop,
        byte_rate=rates.bytes,
        flop={name: least.flop for name, least in work.items()},
        bytes={name: least.bytes for name, least in work.items()},
        rounds=max((len(laps) for laps in samples.values()), default=0),
        rows=finished,
    )


def rounds(workload: Workload, tasks: dict[str, Task], drop: Callable[[str, str], None], seconds: float) -> Samples:
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
                return interleave(wrapped, seconds=seconds, warm_up=warm_up, seed=workload.seed)
        except OutOfMemory as error:
            name, reason = error.name, error.reason
        del tasks[name], wrapped
        drop(name, reason)
        release(device)
    return {}


def _too_large(name: str, reason: str) -> Checked:
    return Checked(None, Row(name, "skipped", f"out of memory: {reason}"), None)


class Rows:
    """Sets of rows to rotate through, in any dtype that a variant wants."""

    def __init__(self, workload: Workload) -> None:
        first = workload.draw()
        size = max(1, sum(tensor.nbytes for tensor in first.values()))
        count = min(MOST_SETS, max(2, math.ceil(ROTATED_BYTES / size)))
        self._dtype = workload.dtype
        self._sets: dict[torch.dtype, list[Tensors]] = {
            workload.dtype: [first, *(workload.draw() for _ in range(count - 1))]
        }

    def get(self, turn: int, dtype: torch.dtype | None) -> Tensors:
        """The rows of a round. Their values are the same in every dtype."""
        dtype = dtype or self._dtype
        if dtype not in self._sets:
            self._sets[dtype] = [
                {name: _cast(t, dtype) for name, t in rows.items()} for rows in self._sets[self._dtype]
            ]
        return self._sets[dtype][turn % len(self._sets[dtype])]


class Truth:
    """The exact results of a set of rows, and the reference's."""

    def __init__(self, workload: Workload, rows: Tensors) -> None:
        self.dtype = workload.dtype
        self.exact = {name: tensor.detach() for name, tensor in workload.exact(rows).items()}
        self.reference = outcome(workload.reference(), rows)


def _draw(workload: Workload) -> tuple[Rows, Truth]:
    rows = Rows(workload)
    return rows, Truth(workload, rows.get(0, None))


def examine(workload: Workload, name: str, rows: Rows, truth: Truth) -> Checked:
    """Builds a variant, runs it once, and judges what it gave."""
    checked, reason = fitting(lambda: _examine(workload, name, rows, truth), workload.device)
    return checked or _too_large(name, reason)


def _examine(workload: Workload, name: str, rows: Rows, truth: Truth) -> Checked:
    free, needed = machine.available(workload.device), workload.memory(name)
    if free is not None and needed > MEMORY_SHARE * free:
        reason = f"it would take about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        return Checked(None, Row(name, "skipped", reason), None)
    try:
        variant = workload.build(name)
        taken = rows.get(0, variant.dtype)
        before, skipped = dispatch.calls.copy(), graph.skipped()
        ran = _recorded(variant, rows.get(1, variant.dtype), taken) if variant.prepare else _run(variant, taken)
    except Absent as reason:
        return Checked(None, Row(name, "absent", str(reason)), None)
    except _Unrecordable as reason:
        # Not every rival can be; ours must.
        status = "refused" if name.startswith("ours") else "absent"
        return Checked(None, Row(name, status, f"it cannot be recorded: {reason}"), None)
    served = dispatch.calls - before
    if variant.solves is not None:
        truth = Truth(variant.solves, rows.get(0, None))
    verdict = gate.judge(ran.found, truth.exact, truth.reference, truth.dtype, workload.operators)
    left_out = graph.skipped() - skipped if workload.device.type == "cuda" else 0
    # A graph's memory is its own between runs, too.
    peak = None if variant.prepare or verdict.refused else _peak(workload, variant, taken)
    row = Row(
        name,
        "refused" if verdict.refused else "measured",
        verdict.refused,
        backend="+".join(sorted({backend for _, backend in served})) or None,
        error=verdict.ratio,
        worst=verdict.worst,
        saved_bytes=ran.saved_bytes,
        compile_seconds=ran.compile_seconds,
        peak_bytes=peak.growth if peak else None,
        returned_bytes=peak.returned if peak else None,
        remark=_remark(variant, left_out),
    )
    return Checked(variant, row, ran.flop)


def _remark(variant: Variant, left_out: int) -> str | None:
    remarks = [f"solves another problem: {variant.solves.title}"] if variant.solves is not None else []
    if left_out:
        remarks.append(f"torch.compile left CUDA graphs out {left_out} times")
    return "; ".join(remarks) or None


def outcome(variant: Variant, rows: Tensors) -> Tensors:
    """Results, gradients and counters of one run."""
    if variant.prepare is not None:
        rows = variant.prepare(rows)
    variant.reset()
    if variant.step is not None:
        return _tidied(variant, *variant.step(rows))
    results = variant.forward(rows)
    return _tidied(variant, results, gradients(variant, rows, results))


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
        if variant.step is not None or variant.whole is not None:
            (variant.step or variant.whole)(taken)  # type: ignore[misc]
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
        ratios = {
            rival: _plain([b / a for a, b in zip(mine, laps[rival][one], strict=True)])
            for rival in against
            if one in laps[rival]
        }
        middle, floor_seconds = quantiles(mine), floor.seconds(least, rates)
        found[one] = Timing(
            *middle,
            samples=mine,
            against=ratios,
            floor=floor_seconds,
            share=floor_seconds / middle.median,
            flop=(flop[one] or None) if flop else None,
        )
    return found


def _plain(ratios: Sequence[float]) -> tuple[float, float, float]:
    found = quantiles(ratios)
    return found.median, found.p10, found.p90


def _passes(rounds: Sequence[tuple[float, ...]], names: Sequence[str]) -> dict[str, list[float]]:
    if len(names) > 1 and len(rounds[0]) == 1:
        return {"both": [lap for (lap,) in rounds]}
    passes = {name: [laps[place] for laps in rounds] for place, name in enumerate(names)}
    return passes | ({"both": [sum(laps) for laps in rounds]} if len(names) > 1 else {})


def _tidied(variant: Variant, results: Tensors, taken: Tensors) -> Tensors:
    """Copies of all that a run gave: a graph's next run writes to the same place."""
    tidy = {name: variant.tidy(name, gradient) for name, gradient in taken.items()}
    return {name: t.detach().clone() for name, t in (results | tidy | variant.counters()).items()}


def _peak(workload: Workload, variant: Variant, rows: Tensors) -> Peak | None:
    def step() -> list[torch.Tensor]:
        results = variant.forward(rows)
        return [*results.values(), *gradients(variant, rows, results).values()]

    return measure_peak(step, workload.device)


def _run(variant: Variant, rows: Tensors) -> _Ran:
    if not variant.compiled:
        return _watched(variant, rows)
    begin = time.perf_counter()
    with _compiling():
        found = outcome(variant, rows)
    compile_seconds = time.perf_counter() - begin
    with count_saved([*variant.holds(), *rows.values()]) as saved:
        kept = variant.forward(rows)
    del kept
    return _Ran(found, variant.products, saved.bytes, compile_seconds)


def _recorded(variant: Variant, others: Tensors, rows: Tensors) -> _Ran:
    """For a variant of graphs: what it gives when it replays one, which torch.compile does from the third run on.

    It is recorded on other rows than it is judged on, so that what has those in it for good is refused.
    """
    begin = time.perf_counter()
    try:
        with _compiling():
            outcome(variant, others)
    except RuntimeError as error:
        if variant.compiled or isinstance(error, Absent | torch.OutOfMemoryError):
            raise
        if isinstance(error.__context__, torch.OutOfMemoryError):
            # Ending the recording failed for it.
            raise error.__context__ from None
        raise _Unrecordable(first_line(error)) from error
    compile_seconds = time.perf_counter() - begin if variant.compiled else None
    if variant.step is None:
        outcome(variant, others)
    else:
        _poison(*variant.step(others))
    return _Ran(outcome(variant, rows), variant.products, compile_seconds=compile_seconds)


def _poison(results: Tensors, taken: Tensors) -> None:
    """Overwrites what a replay gave, so that the next one has to write it."""
    for tensor in (*results.values(), *taken.values()):
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -1)


def _watched(variant: Variant, rows: Tensors) -> _Ran:
    """The outcome, FLOP of the matrix products of each pass, and bytes saved for backward, all in one run."""
    if any(tensor.is_cuda for tensor in rows.values()):
        # Kernels that are tuned at their first launch must not be timed while memory is poisoned.
        gradients(variant, rows, variant.forward(rows))
    variant.reset()
    with _poisoned(), ExitStack() as hooks:
        saved = hooks.enter_context(count_saved([*variant.holds(), *rows.values()]))
        with FlopCounterMode(display=False) as forward:
            results = variant.forward(rows)
        hooks.close()
        saved_bytes = saved.bytes
        with FlopCounterMode(display=False) as backward:
            found = _tidied(variant, results, gradients(variant, rows, results))
    counted = {"forward": float(forward.get_total_flops()), "backward": float(backward.get_total_flops())}
    return _Ran(found, variant.products or counted, saved_bytes)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fills memory that nobody has written yet with NaN, so that a result which stays unwritten is refused."""
    settings: Any = torch.utils.deterministic  # typed without what it sets
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("torch._"):
            raise
        raise Absent(f"torch.compile fails here: {first_line(error)}") from error


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
