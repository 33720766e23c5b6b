"""One point of a sweep: the correctness check, and then the memory of each variant."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.core.benchmark import Benchmark, InputSets, Variant, run_step, warm_up
from bench.core.correctness import Truth, check, skipped
from bench.core.measure import inputs_and_truth, untimed
from bench.core.memory import Peak, measure_peak, release, try_run
from bench.core.results import Case, Row
from bench.core.timing import Say
from bench.e2e.memory.resident import NotMeasurable, Point, resident_growth

# A CUDA graph is captured on one set and checked on the other.
INPUT_SETS = 2


def measure(benchmark: Benchmark, names: Sequence[str], *, resident: bool = True, say: Say = lambda _: None) -> Case:
    """Measure the memory of the variants whose results are right.

    Args:
        benchmark: the operator or training step at one size.
        names: variants, in the order of their rows.
        resident: whether resident memory is measured too, on a CPU, in a process for each variant.
        say: called with what happens next.
    """
    variants = benchmark.select(names)
    if any(variant.compiled for variant in variants):
        # Otherwise torch.compile would switch to dynamic shapes at the second size.
        torch._dynamo.reset()
    release(benchmark.device)
    say("inputs and exact result")
    drawn, reason = try_run(lambda: inputs_and_truth(benchmark, INPUT_SETS), benchmark.device)
    rows = []
    for variant in variants:
        say(f"{'compiling and ' if variant.compiled else ''}checking {variant.name} and its peak")
        row = _measure(benchmark, variant, *drawn) if drawn else skipped(variant, f"the exact result: {reason}").row
        if resident and row.status == "measured" and not benchmark.on_cuda:
            say(f"resident memory of {variant.name}")
            row = _with_resident(benchmark, row)
        rows.append(row)
    return untimed(benchmark, rows)


def _measure(benchmark: Benchmark, variant: Variant, inputs: InputSets, truth: Truth) -> Row:
    checked = check(benchmark, variant, inputs, truth)
    built = checked.implementation
    if checked.row.status != "measured" or built is None or built.whole_step is None:
        return checked.row

    def whole_step_peak() -> Peak:
        mine = inputs.get(0, variant.dtype)
        warm_up(built, mine)
        return measure_peak(lambda: run_step(built, mine), benchmark.device)

    peak, reason = try_run(whole_step_peak, benchmark.device)
    if peak is None:
        return skipped(variant, reason).row
    return replace(checked.row, peak_bytes=peak.growth, returned_bytes=peak.returned)


def _with_resident(benchmark: Benchmark, row: Row) -> Row:
    kind = type(benchmark)
    point = Point(kind, benchmark.sizes, benchmark.dtype, benchmark.seed, row.variant, torch.get_num_threads())
    try:
        return replace(row, resident_bytes=resident_growth(point))
    except NotMeasurable as error:
        remark = f"no resident memory: {error}"
        return replace(row, remark=f"{row.remark}; {remark}" if row.remark else remark)
