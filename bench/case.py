"""One case from beginning to end: exact result, gate, saved bytes, interleaved times."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import floor, gate, machine
from bench.measure import Samples, Stopwatch, Task, interleave, quantiles
from bench.results import Case, Row, Timing
from bench.saved import count_saved
from bench.workload import Absent, Tensors, Variant, Workload
from xsmoe_kernels import dispatch

# Rows are rotated through this much memory, so that no round finds the last one's in a cache of its own.
ROTATED_BYTES = 128 << 20
MOST_SETS = 16
# Memory that a variant may take of what is free.
MEMORY_SHARE = 0.8

Say = Callable[[str], None]


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
    rows = Rows(workload)
    say("exact result")
    truth = Truth(workload, rows.get(0, None))
    checked = []
    for name in names:
        say(f"{name}: gate")
        checked.append(examine(workload, name, rows, truth))
    running = {
        found.row.variant: found.variant for found in checked if found.variant and found.row.status == "measured"
    }
    tasks = {name: timed(workload, variant, rows) for name, variant in running.items()}
    products, work = workload.products(), workload.work()
    rates, samples = floor.Rates(0.0, 1.0), Samples()
    if running:
        say(f"timing {', '.join(running)}")
        # Compiled once per case, in the gate; a second time inside a timed round would pass for slowness.
        with torch.compiler.set_stance("fail_on_recompile"):
            samples = interleave(
                tasks | floor.probes(products, workload.dtype, workload.device), seconds=seconds, seed=workload.seed
            )
        rates = floor.rates(samples, products, workload.dtype)
    counted = {found.row.variant: found.flop for found in checked}
    finished = []
    for found in checked:
        name, passes = found.row.variant, {}
        if name in running:
            flop = counted[name] or counted.get(running[name].like)
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


def examine(workload: Workload, name: str, rows: Rows, truth: Truth) -> Checked:
    """Builds a variant, runs it once, and judges what it gave."""
    free, needed = machine.available(workload.device), workload.memory(name)
    if free is not None and needed > MEMORY_SHARE * free:
        reason = f"it would take about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        return Checked(None, Row(name, "skipped", reason), None)
    try:
        variant = workload.build(name)
        taken = rows.get(0, variant.dtype)
        before = dispatch.calls.copy()
        if variant.compiled:
            begin = time.perf_counter()
            with _compiling(name):
                found = outcome(variant, taken)
            compile_seconds, flop = time.perf_counter() - begin, variant.products
            with count_saved([*variant.holds(), *taken.values()]) as saved:
                kept = variant.forward(taken)
            saved_bytes = saved.bytes
            del kept
        else:
            compile_seconds = None
            found, counted, saved_bytes = _watched(variant, taken)
            flop = variant.products or counted
    except Absent as reason:
        return Checked(None, Row(name, "absent", str(reason)), None)
    verdict = gate.judge(found, truth.exact, truth.reference, truth.dtype)
    served = dispatch.calls - before
    row = Row(
        name,
        "refused" if verdict.refused else "measured",
        verdict.refused,
        backend="+".join(sorted({backend for _, backend in served})) or None,
        error=verdict.ratio,
        worst=verdict.worst,
        saved_bytes=saved_bytes,
        compile_seconds=compile_seconds,
    )
    return Checked(variant, row, flop)


def outcome(variant: Variant, rows: Tensors) -> Tensors:
    """Results, gradients and counters of one run."""
    variant.reset()
    results = variant.forward(rows)
    return _gathered(variant, rows, results)


def timed(workload: Workload, variant: Variant, rows: Rows) -> Task:
    """One round of a variant: forward, then backward if there is one."""

    def task(turn: int) -> tuple[float, ...]:
        taken = rows.get(turn, variant.dtype)
        leaves = list(variant.leaves(taken).values())
        watch = Stopwatch(workload.device)
        y = variant.forward(taken)["y"]
        watch.mark()
        if leaves:
            torch.autograd.grad(y, leaves, taken["grad"])
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
        mine = laps[name][one]
        ratios = {rival: _plain([b / a for a, b in zip(mine, laps[rival][one], strict=True)]) for rival in against}
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
    passes = {name: [laps[place] for laps in rounds] for place, name in enumerate(names)}
    return passes | ({"both": [sum(laps) for laps in rounds]} if len(names) > 1 else {})


def _gathered(variant: Variant, rows: Tensors, results: Tensors) -> Tensors:
    leaves, gradients = variant.leaves(rows), {}
    if leaves:
        taken = torch.autograd.grad(results["y"], list(leaves.values()), rows["grad"])
        gradients = {name: variant.tidy(name, gradient) for name, gradient in zip(leaves, taken, strict=True)}
    return {name: t.detach() for name, t in (results | gradients | variant.counters()).items()}


def _watched(variant: Variant, rows: Tensors) -> tuple[Tensors, dict[str, float], int]:
    """The outcome, FLOP of the matrix products of each pass, and bytes saved for backward, all in one run."""
    variant.reset()
    with _poisoned(), ExitStack() as hooks:
        saved = hooks.enter_context(count_saved([*variant.holds(), *rows.values()]))
        with FlopCounterMode(display=False) as forward:
            results = variant.forward(rows)
        hooks.close()
        saved_bytes = saved.bytes
        with FlopCounterMode(display=False) as backward:
            found = _gathered(variant, rows, results)
    counted = {"forward": float(forward.get_total_flops()), "backward": float(backward.get_total_flops())}
    return found, counted, saved_bytes


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
def _compiling(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("torch._"):
            raise
        first = next((row for row in str(error).splitlines() if row.strip()), type(error).__name__)
        raise Absent(f"torch.compile fails here: {first}") from error


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
