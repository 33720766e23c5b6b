"""`python -m bench memory`: what operators and training steps save and take, as their sizes grow."""

import argparse
import sys
import time
from pathlib import Path

import torch

from bench import pictures, results
from bench.arguments import (
    DTYPES,
    UsageError,
    add_machine,
    check_kinds,
    check_machine,
    choose,
    listed,
    make_file,
    make_folder,
    sizes_of,
)
from bench.case import drawn
from bench.memory import plots, tables
from bench.memory.growth import curves
from bench.memory.point import measure
from bench.memory.step import step_of, warm_up
from bench.memory.sweeps import SWEPT, Plan, plan
from bench.results import Case
from bench.session import Session
from bench.snapshot import VIEWER, recorded
from bench.workload import Workload

SNAPPED = ("ours-eager", "ours")
"""Variants whose step a snapshot may show: beside the former the latter replays a graph, and allocates nothing."""


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "memory",
        help="bytes saved for backward and taken at the peak, as experts, rows, rank, users and modalities grow",
        description="Measures memory along sweeps: one size at a time changes, and the others stay at a centre. A "
        "variant whose result is wrong gets no number, and makes the exit code 1. docs/benchmarking.md says how to "
        "read the tables.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(SWEPT)}; side_moe by default. step is a training step"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        metavar="L=N[,N]",
        help="as in E=1,10,100 D=384: several values are a sweep, one is where the other sweeps have that letter",
    )
    parser.add_argument("--quick", action="store_true", help="few and small sizes")
    add_machine(parser)
    parser.add_argument("--variants", metavar="V[,V]", help="only these; also compiled ones, which are left out else")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes everything, after every point")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draws a picture of every sweep (matplotlib)")
    parser.add_argument(
        "--snapshot",
        type=Path,
        metavar="PATH",
        help=f"on a GPU: every allocation of a step of {SNAPPED[-1]} at the centre, for PyTorch's memory viewer",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures and prints.

    Returns 1 if a row was refused or there is no snapshot, 2 if the command line is wrong, 130 after Ctrl-C.
    """
    started = time.monotonic()
    try:
        planned = _planned(options, torch.device(options.device))
    except UsageError as error:
        print(f"python -m bench memory: {error}", file=sys.stderr)
        return 2
    session = Session(options, started, timed=False)
    stopped, snapped = False, True
    try:
        for name, sizes, names in planned:
            kind = SWEPT[name].kind
            done = len(session.cases)
            for letter, points in sizes.sweeps():
                try:
                    for point in points:
                        if not any(case.sizes == point for case in session.cases[done:]):
                            session.take(kind, point, names, measure)
                finally:
                    _show([case for case in session.cases[done:] if case.sizes in points], letter)
            if options.snapshot is not None:
                workload, reason = drawn(kind, sizes.centre, session.dtype, session.device, options.seed)
                snapped = workload is not None and _snap(workload, session.cases[done:], options.snapshot)
                if workload is None:
                    print(f"\nno snapshot: out of memory: {reason}", flush=True)
    except KeyboardInterrupt:
        stopped = True
        print(f"\nStopped after {len(session.cases)} points.", flush=True)
    if options.plot is not None and session.cases:
        _draw(session.run(), options.plot)
    refused = session.any_refused()
    return 130 if stopped else 1 if refused or not snapped else 0


def _planned(options: argparse.Namespace, device: torch.device) -> list[tuple[str, Plan, list[str]]]:
    """For each name its sweeps and variants.

    Raises:
        UsageError: an argument that cannot be served; the message names it.
    """
    names = list(dict.fromkeys(options.names)) or ["side_moe"]
    for name in names:
        if name not in SWEPT:
            raise UsageError(f"there is no memory benchmark of {name!r}; there is {', '.join(SWEPT)}")
    check_machine(options.device, options.threads)
    if options.snapshot is not None and device.type != "cuda":
        raise UsageError(
            "--snapshot needs a GPU, of whose memory alone torch keeps a history; give --device cuda where there is "
            "one, or leave it out"
        )
    if options.snapshot is not None and len(names) > 1:
        raise UsageError(f"--snapshot is of one name, not of {', '.join(names)}; run the command once for each")
    asked = sizes_of(options.sizes)
    check_kinds({name: SWEPT[name].kind for name in names}, options.dtype, asked)
    planned = []
    for name in names:
        sizes = plan(SWEPT[name], asked, quick=options.quick, cuda=device.type == "cuda")
        # Names do not depend on sizes, and weights of these are drawn at once.
        workload = SWEPT[name].kind(dict.fromkeys(sizes.centre, 1), DTYPES[options.dtype], device)
        variants = choose(workload, listed(options.variants) or usual(workload), [])[0]
        if options.snapshot is not None and snapped(workload) not in variants:
            raise UsageError(
                f"--snapshot shows a step of {snapped(workload)}, which is not among --variants {options.variants}"
            )
        planned.append((name, sizes, variants))
    make_file("--json", options.json)
    make_file("--snapshot", options.snapshot)
    make_folder("--plot", options.plot)
    return planned


def usual(workload: Workload) -> list[str]:
    """The variants of an ordinary run: what needs no compiler, and keeps no graph's memory between steps."""
    left_out = {"ours"} if "ours-eager" in workload.variants() else set()
    return [
        name
        for name in workload.variants()
        if not name.startswith("compiled") and not name.endswith("-graph") and name not in left_out
    ]


def snapped(workload: Workload) -> str:
    """The variant whose step a snapshot shows: the first of SNAPPED that there is."""
    return next(name for name in SNAPPED if name in workload.variants())


def _show(cases: list[Case], letter: str) -> None:
    for curve in curves(map(results.as_saved, cases)):
        if curve.letter == letter:
            print(f"\n{tables.table(curve)}", flush=True)


def _snap(workload: Workload, cases: list[Case], path: Path) -> bool:
    """Writes a snapshot of a step at the centre, if it was measured there and is right; says whether it did."""
    shown = snapped(workload)
    right = [row for case in cases if case.sizes == workload.sizes for row in case.rows if row.variant == shown]
    if not right or right[0].status != "measured":
        why = right[0].status if right else "not measured at the centre, which is none of the values"
        print(f"\nno snapshot: {shown} is {why}", flush=True)
        return False
    variant = workload.build(shown)
    rows = workload.draw()
    # Kernels are compiled, and the optimizer's state is made, in the first.
    warm_up(variant, rows)
    with recorded(path):
        step_of(variant, rows)()
    print(f"\nsnapshot of a step of {shown}: {path}; open {VIEWER} in a browser and drop the file there", flush=True)
    return True


def _draw(found: results.Run, folder: Path) -> None:
    pictures.announced(lambda: plots.write(curves(map(results.as_saved, found.cases)), found.machine, folder))
