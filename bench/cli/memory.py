"""`python -m bench memory`: memory of operators and training steps as their sizes grow."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.cli.common import (
    DTYPES,
    Session,
    UsageError,
    add_machine,
    check_file,
    check_kinds,
    check_machine,
    choose_variants,
    make_folder,
    parse_sizes,
    split_names,
)
from bench.core.benchmark import Benchmark
from bench.core.measure import create
from bench.core.results import Case, as_saved
from bench.e2e.memory import report
from bench.e2e.memory.curves import curves
from bench.e2e.memory.measure import measure
from bench.e2e.memory.snapshot import snapshot_variant, write_snapshot
from bench.e2e.memory.sweeps import SWEPT, Plan, plan


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "memory",
        help="saved activations and peak memory as experts, rows, rank, users and modalities grow",
        description="Measures memory along sweeps: one size changes at a time, and the others stay at a centre. A "
        "variant with a wrong result gets no number, and makes the exit code 1. docs/benchmarking.md explains the "
        "tables.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(SWEPT)}; default: side_moe. step is a training step"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        metavar="L=N[,N]",
        help="for example E=1,10,100 D=384: several values are a sweep, one value is the centre of other sweeps",
    )
    parser.add_argument("--quick", action="store_true", help="few and small sizes")
    add_machine(parser)
    parser.add_argument("--variants", metavar="V[,V]", help="only these; compiled variants can be named here")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results, after every point")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw a plot of each sweep (matplotlib)")
    parser.add_argument(
        "--snapshot",
        type=Path,
        metavar="PATH",
        help="on a GPU: all allocations of a step of ours at the centre, for PyTorch's memory viewer",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and print.

    Returns:
        1 if a row was refused or a snapshot is missing, 2 if the command line is wrong, 130 after Ctrl-C, 0 otherwise.
    """
    started = time.monotonic()
    try:
        planned = _plan(options, torch.device(options.device))
    except UsageError as error:
        print(f"python -m bench memory: {error}", file=sys.stderr)
        return 2
    session = Session(options, started, timed=False)
    stopped, complete = False, True
    try:
        for name, sweeps, variants in planned:
            kind = SWEPT[name].kind
            done = len(session.cases)
            for letter, points in sweeps.sweeps():
                try:
                    for point in points:
                        if not any(case.sizes == point for case in session.cases[done:]):
                            session.measure(kind, point, variants, measure)
                finally:
                    _print_curves([case for case in session.cases[done:] if case.sizes in points], letter)
            if options.snapshot is not None:
                benchmark, reason = create(kind, sweeps.centre, session.dtype, session.device, options.seed)
                complete = benchmark is not None and write_snapshot(benchmark, session.cases[done:], options.snapshot)
                if benchmark is None:
                    print(f"\nno snapshot: out of memory: {reason}", flush=True)
    except KeyboardInterrupt:
        stopped = True
        print(f"\nStopped after {len(session.cases)} points.", flush=True)
    if options.plot is not None and session.cases:
        from bench.report.plots import draw_and_print

        found = curves(map(as_saved, session.cases))
        draw_and_print(lambda: report.write_plots(found, session.facts, options.plot))
    refused = session.any_refused()
    return 130 if stopped else 1 if refused or not complete else 0


def _plan(options: argparse.Namespace, device: torch.device) -> list[tuple[str, Plan, list[str]]]:
    """Return the sweeps and the variants of each name.

    Raises:
        UsageError: an invalid argument.
    """
    names = list(dict.fromkeys(options.names)) or ["side_moe"]
    for name in names:
        if name not in SWEPT:
            raise UsageError(f"there is no memory benchmark of {name!r}; there is {', '.join(SWEPT)}")
    check_machine(options.device, options.threads)
    if options.snapshot is not None and device.type != "cuda":
        raise UsageError("--snapshot needs a GPU: torch records allocations on GPUs only. Give --device cuda")
    if options.snapshot is not None and len(names) > 1:
        raise UsageError(f"--snapshot is of one name, not of {', '.join(names)}; run the command once for each")
    asked = parse_sizes(options.sizes)
    check_kinds({name: SWEPT[name].kind for name in names}, options.dtype, asked)
    planned = []
    for name in names:
        sweeps = plan(SWEPT[name], asked, quick=options.quick, cuda=device.type == "cuda")
        benchmark = SWEPT[name].kind.smallest(DTYPES[options.dtype], device)
        variants = choose_variants(benchmark, split_names(options.variants) or default_variants(benchmark), [])[0]
        if options.snapshot is not None and (shown := snapshot_variant(benchmark).name) not in variants:
            raise UsageError(f"--snapshot shows a step of {shown}, which is not among --variants {options.variants}")
        planned.append((name, sweeps, variants))
    check_file("--json", options.json)
    check_file("--snapshot", options.snapshot)
    make_folder("--plot", options.plot)
    return planned


def default_variants(benchmark: Benchmark) -> list[str]:
    """Return the default variants without those of torch.compile and of CUDA graphs, which keep memory of their own."""
    return [
        variant.name
        for variant in benchmark.variants()
        if variant.default and not variant.compiled and not variant.cuda_graph
    ]


def _print_curves(cases: Sequence[Case], letter: str) -> None:
    for curve in curves(map(as_saved, cases)):
        if curve.letter == letter:
            print(f"\n{report.curve_table(curve)}", flush=True)
