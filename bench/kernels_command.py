"""`python -m bench kernels`: operators against their rivals, at many sizes."""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from bench import case_plots, kernels, pictures, results
from bench.arguments import (
    DTYPES,
    UsageError,
    add_machine,
    check_kinds,
    check_machine,
    check_seconds,
    choose,
    listed,
    make_file,
    make_folder,
    sizes_of,
)
from bench.case import measure
from bench.session import Session
from bench.workload import Workload

SECONDS, QUICK_SECONDS = 8.0, 3.0


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "kernels",
        help="operators against their rivals: time, share of the floor, bytes saved for backward, error",
        description="Times operators against their rivals in interleaved rounds. A variant whose result is wrong gets "
        "no time, and makes the exit code 1. docs/benchmarking.md says how to read the tables.",
    )
    add_options(parser, kernels, "operators")


def add_options(parser: argparse.ArgumentParser, rooms: ModuleType, called: str) -> None:
    """Makes `parser` one that measures what a package of rooms holds, `called` by that word in its help."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{called}; all of them by default: {', '.join(rooms.ROOMS)}"
    )
    parser.add_argument("--sizes", nargs="+", default=[], metavar="L=N[,N]", help="as in N=256,2816 E=10; others stay")
    parser.add_argument("--quick", action="store_true", help="few sizes and few rounds")
    add_machine(parser)
    parser.add_argument("--variants", metavar="V[,V]", help="only these; also ones that an ordinary run leaves out")
    parser.add_argument("--against", metavar="V[,V]", help="the variants that others are compared with")
    parser.add_argument("--seconds", type=float, help=f"of timing for each size; {SECONDS:g}, quick {QUICK_SECONDS:g}")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes everything, every sample too, to a file")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draws a picture of each case (matplotlib)")
    parser.set_defaults(run=run, rooms=rooms)


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table per case, and returns 1 if a row was refused, 2 if the command line is wrong."""
    started = time.monotonic()
    try:
        _check(options)
        planned = list(plan(options, torch.device(options.device)))
    except UsageError as error:
        print(f"python -m bench {options.given[0]}: {error}", file=sys.stderr)
        return 2
    session = Session(options, started, timed=True)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    for kind, sizes, names, against in planned:
        case = session.take(kind, sizes, names, partial(measure, against=against, seconds=seconds))
        print(f"\n{results.table(results.as_saved(case))}", flush=True)
    if options.plot is not None:
        pictures.announced(lambda: case_plots.write(session.run(), options.plot))
    return 1 if session.any_refused() else 0


def _check(options: argparse.Namespace) -> None:
    """What argparse does not see, and what would otherwise fail after everything was measured."""
    check_machine(options.device, options.threads)
    check_seconds(options.seconds)
    make_folder("--plot", options.plot)
    make_file("--json", options.json)


def plan(
    options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[type[Workload], dict[str, int], list[str], list[str]]]:
    """What to measure: the room, its sizes, the variants and the baselines, for each case."""
    asked = sizes_of(options.sizes)
    rooms = options.rooms
    kinds: dict[str, type[Workload]] = {}
    for name in options.names or rooms.ROOMS:
        if name not in rooms.ROOMS:
            raise UsageError(f"there is no benchmark of {name!r}; there is {', '.join(rooms.ROOMS)}")
        kinds[name] = rooms.room(name)
    check_kinds(kinds, options.dtype, asked)
    for kind in kinds.values():
        letters = {**kind.letters, **(kind.cuda_sizes if device.type == "cuda" else {})}
        letters |= kind.quick_sizes if options.quick else {}
        letters |= {letter: values for letter, values in asked.items() if letter in letters}
        every = list(combinations(letters))
        # Names do not depend on sizes, and weights of these are drawn at once.
        workload = kind(dict.fromkeys(letters, 1), DTYPES[options.dtype], device)
        names, against = choose(workload, listed(options.variants), listed(options.against))
        for sizes in [sizes for sizes in every if kind.sensible(sizes)] or every:
            yield kind, sizes, names, against


def combinations(letters: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """All combinations of sizes, the last letter changing first."""
    for values in itertools.product(*letters.values()):
        yield dict(zip(letters, values, strict=True))
