"""`python -m bench kernels`: operators and their baselines at many sizes."""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
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
    check_seconds,
    choose_variants,
    make_folder,
    parse_sizes,
    split_names,
)
from bench.core.benchmark import Benchmark, load_benchmark
from bench.core.measure import measure
from bench.core.results import as_saved
from bench.ops import OPERATORS
from bench.report import tables

SECONDS, QUICK_SECONDS = 8.0, 3.0


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "kernels",
        help="operators and their baselines: time, share of the speed-of-light bound, saved activations, error",
        description="Times operators and their baselines in interleaved rounds. A variant with a wrong result gets no "
        "time, and makes the exit code 1. docs/benchmarking.md explains the tables.",
    )
    add_options(parser, OPERATORS, "operators")


def add_options(parser: argparse.ArgumentParser, registry: Mapping[str, str], noun: str) -> None:
    """Make `parser` measure the benchmarks of a registry, which its help calls `noun`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{noun}; default: all, {', '.join(registry)}")
    parser.add_argument("--sizes", nargs="+", default=[], metavar="L=N[,N]", help="for example N=256,2816 E=10")
    parser.add_argument("--quick", action="store_true", help="few sizes and few rounds")
    add_machine(parser)
    parser.add_argument("--variants", metavar="V[,V]", help="only these; optional variants can be named here")
    parser.add_argument("--against", metavar="V[,V]", help="the baselines that other variants are compared with")
    parser.add_argument("--seconds", type=float, help=f"of timing per size; {SECONDS:g}, quick {QUICK_SECONDS:g}")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results and samples to a file")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw a plot of each case (matplotlib)")
    parser.set_defaults(run=run, registry=registry)


def run(options: argparse.Namespace) -> int:
    """Measure, and print a table per case; return 1 if a row was refused, 2 if the command line is wrong."""
    started = time.monotonic()
    try:
        check_machine(options.device, options.threads)
        check_seconds(options.seconds)
        make_folder("--plot", options.plot)
        check_file("--json", options.json)
        planned = list(plan(options, torch.device(options.device)))
    except UsageError as error:
        print(f"python -m bench {options.given[0]}: {error}", file=sys.stderr)
        return 2
    session = Session(options, started, timed=True)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    for kind, sizes, names, against in planned:
        case = session.measure(kind, sizes, names, partial(measure, against=against, seconds=seconds))
        print(f"\n{tables.case_table(as_saved(case))}", flush=True)
    if options.plot is not None:
        from bench.report import plots

        plots.draw_and_print(lambda: plots.write_cases(session.run(), options.plot))
    return 1 if session.any_refused() else 0


def plan(
    options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[type[Benchmark], dict[str, int], list[str], list[str]]]:
    """Yield the benchmark, its sizes, the variants and the baselines of each case."""
    asked = parse_sizes(options.sizes)
    kinds: dict[str, type[Benchmark]] = {}
    for name in options.names or options.registry:
        if name not in options.registry:
            raise UsageError(f"there is no benchmark of {name!r}; there is {', '.join(options.registry)}")
        kinds[name] = load_benchmark(options.registry, name)
    check_kinds(kinds, options.dtype, asked)
    for kind in kinds.values():
        letters = {**kind.default_sizes, **(kind.cuda_sizes if device.type == "cuda" else {})}
        letters |= kind.quick_sizes if options.quick else {}
        letters |= {letter: values for letter, values in asked.items() if letter in letters}
        smallest = kind.smallest(DTYPES[options.dtype], device)
        names, against = choose_variants(smallest, split_names(options.variants), split_names(options.against))
        for sizes in realistic_sizes(kind, letters):
            yield kind, sizes, names, against


def realistic_sizes(kind: type[Benchmark], letters: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """Return the combinations of sizes that occur in practice, or all if none does; the last letter changes first."""
    every = [dict(zip(letters, values, strict=True)) for values in itertools.product(*letters.values())]
    return [sizes for sizes in every if kind.realistic(sizes)] or every
