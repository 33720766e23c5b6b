"""The kernels of a step of ours: `python -m bench.cli.profile mean --device cpu --out table.txt`."""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from bench.cli.broken_pipe import run_and_exit
from bench.cli.common import DTYPES, UsageError, check_machine, parse_sizes
from bench.core import machine
from bench.core.benchmark import Benchmark, load_benchmark, run_step
from bench.core.results import sizes_text
from bench.e2e.step import STEPS as TRAINING_STEPS
from bench.ops import OPERATORS
from bench.report.tables import markdown_table

SIDE_MOE = ["N=2816", "E=10", "D=768", "R=64", "M=2"]
WARM_UP, STEPS, ROUNDS = 5, 20, 5
MAX_ROWS = 40


class KernelTime(NamedTuple):
    """The calls and the time of one kernel per step."""

    name: str
    calls: float
    microseconds: float


class Busy(NamedTuple):
    """Microseconds of a step: while the GPU runs a kernel or copy, and wall-clock time."""

    kernels: float
    wall: float

    def __str__(self) -> str:
        return (
            f"The GPU is busy for {self.kernels:.1f} us of the {self.wall:.1f} us of a step without a profiler (median "
            f"of {ROUNDS} rounds of {STEPS} steps): {self.kernels / self.wall:.0%}."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the table of one step."""
    registry = {**OPERATORS, **TRAINING_STEPS}
    prog = "python -m bench.cli.profile"
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "name", nargs="?", choices=registry, default="side_moe", help="an operator, or the pooling of a training step"
    )
    parser.add_argument("--sizes", nargs="+", default=[], metavar="L=N", help="for example N=2816 E=10")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write the table to a file")
    options = parser.parse_args(arguments)
    kind = load_benchmark(registry, options.name)
    try:
        check_machine(options.device)
        given = {**parse_sizes(SIDE_MOE if options.name == "side_moe" else []), **parse_sizes(options.sizes)}
        if unknown := sorted(set(given) - set(kind.default_sizes)):
            known = sorted(kind.default_sizes)
            raise UsageError(f"--sizes: {options.name} has no size {', '.join(unknown)}; it has {known}")
        if several := [letter for letter, values in given.items() if len(values) > 1]:
            raise UsageError(f"--sizes: only one value of {several[0]}")
    except UsageError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    sizes = {letter: given.get(letter, values)[0] for letter, values in kind.default_sizes.items()}
    benchmark = kind(sizes, DTYPES[options.dtype], torch.device(options.device))
    kernels, busy = measure(benchmark)
    if not kernels:
        print(f"{prog}: the profiler saw no kernel", file=sys.stderr)
        return 1
    title = f"{benchmark.operator} {options.dtype} {sizes_text(sizes)}: one step"
    text = "\n".join([machine.line(machine.describe(benchmark.device)), "", title, "", *table(kernels)])
    if busy is not None:
        text += f"\n\n{busy}"
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0


def measure(benchmark: Benchmark) -> tuple[list[KernelTime], Busy | None]:
    """Return each kernel's time in a step of ours, the longest first; on a GPU, also how busy it is."""
    ours, inputs = benchmark.variant("ours").build(), benchmark.make_inputs()

    def run(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            run_step(ours, inputs)
        if benchmark.on_cuda:
            torch.cuda.synchronize(benchmark.device)
        return time.perf_counter() - begin

    run(WARM_UP)
    # The profiler slows the host down, so the wall-clock time is measured without it.
    wall = statistics.median(run(STEPS) for _ in range(ROUNDS)) / STEPS if benchmark.on_cuda else 0.0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if benchmark.on_cuda else [])]
    with torch_profile(activities=activities) as profiler:
        run(STEPS)
    found = []
    for event in profiler.key_averages():
        # Host time is not a kernel's time, and an operator's device time counts its kernels a second time.
        if benchmark.on_cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spent = event.self_device_time_total if benchmark.on_cuda else event.self_cpu_time_total
        if spent > 0:
            found.append(KernelTime(event.key, event.count / STEPS, spent / STEPS))
    busy = None
    if benchmark.on_cuda:
        on_device = [one for one in profiler.events() if one.device_type == torch.autograd.DeviceType.CUDA]
        busy = Busy(covered([(one.time_range.start, one.time_range.end) for one in on_device]) / STEPS, wall * 1e6)
    return sorted(found, key=lambda one: -one.microseconds), busy


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of time spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def table(kernels: Sequence[KernelTime], max_rows: int = MAX_ROWS) -> list[str]:
    """Return a row for each of the longest kernels, one for the others together, and their sum."""
    total = sum(one.microseconds for one in kernels)
    calls = sum(one.calls for one in kernels)
    shown, others = list(kernels[:max_rows]), kernels[max_rows:]
    if others:
        rest = sum(one.calls for one in others), sum(one.microseconds for one in others)
        shown.append(KernelTime(f"{len(others)} others", *rest))
    rows = [
        [one.name[:80], f"{one.calls:g}", f"{one.microseconds:.1f}", f"{one.microseconds / total:.1%}"] for one in shown
    ]
    rows.append(["all", f"{calls:g}", f"{total:.1f}", "100.0%" if kernels else ""])
    return markdown_table(["kernel", "calls", "us", "share"], rows)


if __name__ == "__main__":
    run_and_exit(main)
