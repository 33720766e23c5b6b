"""Where a step of ours spends its time: `python -m bench.profiled mean --device cpu --out table.txt`."""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bench import kernels, machine, results, steps
from bench.arguments import DTYPES, UsageError, check_machine, sizes_of
from bench.leaving import leave
from bench.workload import Workload, gradients

SIDE_MOE = ["N=2816", "E=10", "D=768", "R=64", "M=2"]
WARM_UP, STEPS, ROUNDS = 5, 20, 5


class Spent(NamedTuple):
    """What one kernel took, of one step."""

    name: str
    calls: float
    microseconds: float


class Busy(NamedTuple):
    """Microseconds of a step: while some kernel or copy runs on the GPU, and as a clock on the wall shows."""

    kernels: float
    wall: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints or writes the table of one step."""
    parser = argparse.ArgumentParser(prog="python -m bench.profiled", description=(__doc__ or "").splitlines()[0])
    houses = {name: house for house in (kernels, steps) for name in house.ROOMS}
    parser.add_argument(
        "name", nargs="?", choices=houses, default="side_moe", help="an operator, or a whole step's pooling"
    )
    parser.add_argument("--sizes", nargs="+", default=[], metavar="L=N", help="as in N=2816 E=10")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, metavar="PATH", help="writes the table to a file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    kind = houses[options.name].room(options.name)
    try:
        check_machine(options.device)
        given = {**sizes_of(SIDE_MOE if options.name == "side_moe" else []), **sizes_of(options.sizes)}
        if unknown := sorted(set(given) - set(kind.letters)):
            raise UsageError(f"--sizes: {options.name} has no size {', '.join(unknown)}; it has {sorted(kind.letters)}")
        if several := [letter for letter, values in given.items() if len(values) > 1]:
            raise UsageError(f"--sizes: one value of {several[0]} only")
    except UsageError as error:
        print(f"python -m bench.profiled: {error}", file=sys.stderr)
        return 2
    sizes = {letter: given.get(letter, values)[0] for letter, values in kind.letters.items()}
    workload = kind(sizes, DTYPES[options.dtype], device)
    title = f"{workload.operator} {options.dtype} {results.lettered(sizes)}: one step"
    spent, busy = measure(workload)
    if not spent:
        print("python -m bench.profiled: the profiler saw no kernel", file=sys.stderr)
        return 1
    text = "\n".join([machine.line(machine.describe(device)), "", title, "", *table(spent)])
    if busy is not None:
        text += f"\n\n{told(busy)}"
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0


def measure(workload: Workload) -> tuple[list[Spent], Busy | None]:
    """What each kernel takes in a step of ours by the profiler, the most expensive first; and how busy a GPU is."""
    variant, rows = workload.build("ours"), workload.draw()
    cuda = workload.device.type == "cuda"

    def run(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            if variant.whole is not None:
                variant.whole(rows)
            else:
                gradients(variant, rows, variant.forward(rows))
        if cuda:
            torch.cuda.synchronize(workload.device)
        return time.perf_counter() - begin

    run(WARM_UP)
    # Without the profiler, which slows the host down.
    wall = statistics.median(run(STEPS) for _ in range(ROUNDS)) / STEPS if cuda else 0.0
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        run(STEPS)
    found = []
    for event in profiler.key_averages():
        # What the host spent is no kernel's time, and an operator's device time is that of its kernels once more.
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0:
            found.append(Spent(event.key, event.count / STEPS, spent / STEPS))
    busy = None
    if cuda:
        on_device = [one for one in profiler.events() if one.device_type == torch.autograd.DeviceType.CUDA]
        at_work = covered([(one.time_range.start, one.time_range.end) for one in on_device])
        busy = Busy(at_work / STEPS, wall * 1e6)
    return sorted(found, key=lambda one: -one.microseconds), busy


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of some spans of time lasts."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def told(busy: Busy) -> str:
    """How much of a step's time the GPU is at work."""
    return (
        f"The GPU is at work for {busy.kernels:.1f} us of the {busy.wall:.1f} us that a step takes without a profiler "
        f"(median of {ROUNDS} rounds of {STEPS} steps): busy {busy.kernels / busy.wall:.0%}."
    )


def table(spent: Iterable[Spent], most: int = 40) -> list[str]:
    """A row for each kernel, the less expensive ones together, and their sum."""
    every = list(spent)
    total = sum(one.microseconds for one in every)
    shown, others = every[:most], every[most:]
    if others:
        rest = Spent(f"{len(others)} others", sum(one.calls for one in others), sum(one.microseconds for one in others))
        shown = [*shown, rest]
    rows = [
        [one.name[:80], f"{one.calls:g}", f"{one.microseconds:.1f}", f"{one.microseconds / total:.1%}"] for one in shown
    ]
    calls = sum(one.calls for one in every)
    rows.append(["all", f"{calls:g}", f"{total:.1f}", "100.0%" if every else ""])
    return results.aligned(["kernel", "calls", "us", "share"], rows)


if __name__ == "__main__":
    leave(main)
