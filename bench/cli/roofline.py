"""`python -m bench roofline`: the machine's ceilings, and the distance of measured steps from them."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cli.common import DTYPES, UsageError, begin, check_file, check_machine, check_seconds
from bench.core import bound, machine, results
from bench.core.benchmark import Product, dtype_name
from bench.core.results import Run
from bench.core.timing import interleave
from bench.report import roofline
from bench.report.comparison import problem_notes
from bench.report.roofline import Ceilings
from bench.report.tables import markdown_table

KIND, SCHEMA = "roofline", 1
SECONDS, QUICK_SECONDS = 10.0, 3.0
# Thin and square products of the paper's sizes: side levels, the loss, and the best case of a library.
PRODUCTS = (
    Product(2816, 768, 64),
    Product(2816, 768, 640),
    Product(2816, 640, 768),
    Product(2560, 128, 2640),
    Product(1024, 1024, 1024),
    Product(4096, 4096, 4096),
)


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "roofline",
        help="the machine's matrix rate and bandwidth; with result files, each step below these ceilings",
        description="With files that --json of `kernels` and `step` wrote: a table of each variant's FLOP per byte of "
        "the least work, the rate it reached, and the ceiling at that intensity, by the rates that were measured "
        "between its rounds. Without files: measures the rates of products at the paper's sizes and of a copy.",
    )
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULTS")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw them (matplotlib)")
    parser.add_argument("--quick", action="store_true", help="without files: fewer products and rounds")
    parser.add_argument("--dtype", choices=DTYPES, help="without files; float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="without files; cpu")
    parser.add_argument("--threads", type=int, metavar="T", help="without files: threads of torch")
    parser.add_argument("--seconds", type=float, help=f"without files: of timing; {SECONDS:g}, quick {QUICK_SECONDS:g}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="without files: write the rates to a file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the tables; return 1 if the files have no step to show, 2 if the command line is wrong."""
    try:
        only_without = ("quick", "dtype", "device", "threads", "seconds", "json")
        if options.results and (given := [name for name in only_without if getattr(options, name)]):
            raise UsageError(f"--{given[0]} is for measuring, and result files are only shown: leave out one of them")
        check_machine(options.device, options.threads)
        check_seconds(options.seconds)
        check_file("--plot", options.plot)
        check_file("--json", options.json)
        runs = [_load(path) for path in options.results]
    except (UsageError, OSError, ValueError) as error:
        print(f"python -m bench roofline: {error}", file=sys.stderr)
        return 2
    return _show(runs, options.plot) if runs else _measure(options)


def _load(path: Path) -> Run:
    """Return a run with its machine.

    Raises:
        ValueError: the file has other content, or does not name the machine.
    """
    run = results.load(path)
    try:
        machine.line(run.machine)
        roofline.machines([run])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name the machine ({error!r} is missing); measure again") from None
    return run


def _show(runs: list[Run], plot: Path | None) -> int:
    points, ceilings = roofline.points(runs), roofline.ceilings(runs)
    if not points or not ceilings:
        print("python -m bench roofline: no step with products was measured in these files", file=sys.stderr)
        return 1
    print(
        f"{machine.line(runs[0].machine)}\n\n{roofline.ceilings_table(ceilings)}\n\n{roofline.points_table(points)}\n\n"
        "FLOP and bytes are those of the least work. The ceiling is the smaller of the matrix rate and FLOP/byte times "
        "the bandwidth, both measured between the rounds of the case."
    )
    for note in problem_notes(row for run in runs for case in run.cases for row in case.rows):
        print(f"\n{note}")
    machines, commits = roofline.machines(runs), dict.fromkeys(run.machine["commit"] for run in runs)
    if len(machines) > 1:
        print(f"\n**Several machines or set-ups, with ceilings for each: {'; '.join(machines)}.**")
    if len(commits) > 1:
        print(f"\n**Several commits: {', '.join(commits)}.**")
    if plot is not None:
        where = (
            f"Steps below the ceilings of {len(machines)} machines" if len(machines) > 1 else "Steps below the ceilings"
        )
        _plot(points, ceilings, where, plot, runs[0].machine if len(machines) == 1 else None)
    return 0


def _measure(options: argparse.Namespace) -> int:
    device, name = torch.device(options.device or "cpu"), options.dtype or "float32"
    dtype, products = DTYPES[name], PRODUCTS[:-1] if options.quick else PRODUCTS
    facts = begin(device, options.threads, timed=False)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    samples = interleave(bound.probes(products, dtype, device), seconds=seconds, warm_up=2)
    rates, byte_rate = bound.product_rates(samples, products, dtype, device), bound.byte_rate(samples, device)
    best = Ceilings(max(rate for _, _, rate in rates), byte_rate)
    body = [
        [f"({p.rows}, {p.inner}) x ({p.inner}, {p.columns})", dtype_name(one), f"{rate / 1e9:.0f}",
         f"{byte_rate / 1e9:.1f}", f"{rate / byte_rate:.1f}"]
        for p, one, rate in rates
    ]  # fmt: skip
    head = ["product", "dtype", "GFLOP/s", "GB/s of a copy", "ridge, FLOP/byte"]
    print("", *markdown_table(head, body), sep="\n")
    print(
        f"\nThe best, {best.flop / 1e9:.0f} GFLOP/s, meets {best.bytes / 1e9:.1f} GB/s at {best.ridge:.1f} FLOP/byte. "
        "Code with fewer FLOP per byte is limited by memory, and code with more by products."
    )
    if options.json is not None:
        written = [{**p._asdict(), "dtype": dtype_name(one), "rate": rate} for p, one, rate in rates]
        found = {"kind": KIND, "schema": SCHEMA, "command": options.given, "machine": facts, "byte_rate": byte_rate}
        results.write_json({**found, "products": written}, options.json)
    if options.plot is not None:
        _plot([], {f"{device.type} {name}": best}, "Ceilings", options.plot, facts)
    return 0


def _plot(
    points: list[roofline.Point], ceilings: dict[str, Ceilings], title: str, path: Path, facts: dict[str, Any] | None
) -> None:
    from bench.report import plots

    if facts is not None:
        title = f"{title} of this machine\n{plots.device_name(facts)}"
    draw = partial(plots.roofline, points, ceilings, title)
    plots.draw_and_print(lambda: plots.write(draw, path))
