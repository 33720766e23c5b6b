"""`python -m bench roofline`: the machine's ceilings, and how far below them steps remain."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine, pictures, results, roofline, standing
from bench.arguments import DTYPES, UsageError, check_machine, check_seconds, make_file
from bench.results import Run
from bench.session import begin

KIND, SCHEMA = "roofline", 1
SECONDS, QUICK_SECONDS = 10.0, 3.0


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "roofline",
        help="the machine's matrix rate and bandwidth; with files of results, each step under these ceilings",
        description="With files that --json of `kernels` and `step` wrote: a table of each variant's FLOP for each "
        "byte of the least work, what it reached, and the ceiling there, by the rates measured between its own rounds. "
        "Without files: measures the rates here and now, of products at the paper's sizes and of a copy.",
    )
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULTS")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draws them (matplotlib)")
    parser.add_argument("--quick", action="store_true", help="without files: fewer products and rounds")
    parser.add_argument("--dtype", choices=DTYPES, help="without files; float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="without files; cpu")
    parser.add_argument("--threads", type=int, metavar="T", help="without files: threads of torch")
    parser.add_argument("--seconds", type=float, help=f"without files: of timing; {SECONDS:g}, quick {QUICK_SECONDS:g}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="without files: writes the rates to a file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the tables; returns 1 if the files have no step to show, 2 if the command line is wrong."""
    try:
        _check(options)
        runs = [_loaded(path) for path in options.results]
    except (UsageError, OSError, ValueError) as error:
        print(f"python -m bench roofline: {error}", file=sys.stderr)
        return 2
    return _shown(runs, options.plot) if runs else _measured(options)


def _check(options: argparse.Namespace) -> None:
    only_here = ("quick", "dtype", "device", "threads", "seconds", "json")
    if options.results and (given := [name for name in only_here if getattr(options, name)]):
        raise UsageError(f"--{given[0]} is for measuring, and files of results are only shown: leave out one of them")
    check_machine(options.device, options.threads)
    check_seconds(options.seconds)
    make_file("--plot", options.plot)
    make_file("--json", options.json)


def _loaded(path: Path) -> Run:
    """A run that says which machine it is of.

    Raises:
        ValueError: the file holds something else, or does not say.
    """
    run = results.load(path)
    try:
        machine.line(run.machine)
        roofline.machines([run])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which machine it is of ({error!r}); measure again") from None
    return run


def _shown(runs: list[Run], picture: Path | None) -> int:
    found, roofs = roofline.points(runs), roofline.ceilings(runs)
    if not found or not roofs:
        print("python -m bench roofline: no step with products was measured in these files", file=sys.stderr)
        return 1
    print(
        f"{machine.line(runs[0].machine)}\n\n{roofline.table_of_ceilings(roofs)}\n\n{roofline.table_of_points(found)}"
    )
    print(
        "\nFLOP and bytes are those of the least work. The ceiling there is the smaller of the matrix rate and "
        "FLOP/byte times the bandwidth, both measured between the rounds of the case."
    )
    for mark in standing.explained(row for run in runs for case in run.cases for row in case.rows):
        print(f"\n{mark}")
    machines, commits = roofline.machines(runs), dict.fromkeys(run.machine["commit"] for run in runs)
    if len(machines) > 1:
        print(f"\n**Not all of one machine or set-up, so each has ceilings of its own: {'; '.join(machines)}.**")
    if len(commits) > 1:
        print(f"\n**Not all of one commit: {', '.join(commits)}.**")
    if picture is not None:
        of = f"{len(machines)} machines" if len(machines) > 1 else _this(runs[0].machine)
        title = f"Steps under the ceilings of {of}"
        pictures.announced(lambda: pictures.write(partial(roofline.draw, found, roofs, title), picture))
    return 0


def _this(facts: dict[str, Any]) -> str:
    return f"this machine\n{pictures.device(facts)}"


def _measured(options: argparse.Namespace) -> int:
    device, dtype = torch.device(options.device or "cpu"), options.dtype or "float32"
    facts = begin(device, options.threads, timed=False)
    print()
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    found = roofline.measure(DTYPES[dtype], device, quick=options.quick, seconds=seconds)
    best = found.best()
    print(roofline.table_of_products(found))
    print(
        f"\nThe best, {best.flop / 1e9:.0f} GFLOP/s, meets {best.bytes / 1e9:.1f} GB/s at {best.ridge:.1f} FLOP/byte: "
        "what does less for each byte is limited by memory, what does more by products."
    )
    if options.json is not None:
        results.write(_as_json(options, facts, found), options.json)
    if options.plot is not None:
        roofs = {f"{device.type} {dtype}": best}
        title = f"The ceilings of {_this(facts)}"
        pictures.announced(lambda: pictures.write(partial(roofline.draw, [], roofs, title), options.plot))
    return 0


def _as_json(options: argparse.Namespace, facts: dict[str, Any], found: roofline.Measured) -> dict[str, Any]:
    """Rates a second; fields as in `ProductRate`."""
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "command": options.given,
        "machine": facts,
        "byte_rate": found.bytes,
        "products": [
            {**one.product._asdict(), "dtype": str(one.dtype).removeprefix("torch."), "rate": one.rate}
            for one in found.products
        ],
    }
