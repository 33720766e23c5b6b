"""`python -m bench quality`: what growth, conditioning, IDs and the other choices are worth, over seeds."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench import pictures, results
from bench.arguments import UsageError, make_file, make_folder
from bench.session import begin

STREAMS = ("catalogue", "returning")


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "quality",
        help="variants of model and training over seeds on one stream: means, errors, paired differences",
        description="Trains variants over seeds on one stream, and compares each with the base variant, the defaults, "
        "paired by seed and by user. A run that is done is kept in the folder, and not run again: after Ctrl-C the "
        "same command goes on. docs/benchmarking.md says what is printed. The exit code is 1 if a run failed.",
    )
    parser.add_argument("--stream", choices=STREAMS, default="returning", help="a generated stream; returning")
    parser.add_argument("--dataset", type=Path, metavar="FOLDER", help="a prepared dataset instead, with --store")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="the dataset's hidden-state store")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="of data and runs; runs/quality")
    parser.add_argument("--variants", default="all", metavar="A,B", help="names with commas, beside the base; all")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="seeds 1 to N; 10")
    parser.add_argument("--windows", type=int, metavar="N", help="of the stream; by default its own, 10 of a dataset")
    parser.add_argument("--epochs", type=int, metavar="N", help="the most of a window; by default the stream's own")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, each with one thread of torch; 1")
    parser.add_argument("--matrix", action="store_true", help="test every window's model on every window")
    parser.add_argument("--quick", action="store_true", help="a generated stream of 4 small windows, 3 epochs each")
    parser.add_argument("--list", action="store_true", help="says what each variant is, and runs nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all summaries")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draws them into a PNG file (matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs what is not done yet, and prints; 1 if a run failed, 2 if the command line is wrong, 130 after Ctrl-C."""
    try:
        _check(options)
    except (UsageError, OSError) as error:
        print(f"python -m bench quality: {error}", file=sys.stderr)
        return 2
    # Only here, since all else of the bench goes without what these need.
    from bench.quality import comparison
    from bench.quality.variants import VARIANTS, chosen

    if options.list:
        for variant in VARIANTS.values():
            print(f"{variant.name}: {variant.sentence}")
        return 0
    try:
        variants = chosen(options.variants)
    except ValueError as error:
        print(f"python -m bench quality: --variants: {error}", file=sys.stderr)
        return 2
    facts = begin(torch.device("cpu"), None, timed=True)
    print()
    try:
        with comparison.processes(options.jobs) as executor:
            found, failures, stopped = comparison.compare(options, variants, executor, facts)
    except ValueError as error:
        print(f"python -m bench quality: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if found["variants"]:
        _show(found, options)
    return 130 if stopped else int(failures > 0)


def _check(options: argparse.Namespace) -> None:
    """Raises UsageError, naming the argument, for what cannot be run."""
    for name, least in (("seeds", 1), ("windows", 2), ("epochs", 1), ("jobs", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} must be at least {least}, not {value}")
    if (options.dataset is None) != (options.store is None):
        raise UsageError("--dataset and --store go together: name both folders, or none of them")
    for name in ("dataset", "store"):
        path = getattr(options, name)
        if path is not None and not path.is_dir():
            raise UsageError(f"--{name}: {path} is no folder; make it with `xsmoe prepare` and `xsmoe encode`")
    if options.quick and options.dataset is not None:
        raise UsageError("--quick is for generated streams; give --windows and --epochs for a dataset")
    make_folder("--folder", options.folder)
    make_file("--json", options.json)
    make_file("--plot", options.plot)


def _show(found: dict[str, Any], options: argparse.Namespace) -> None:
    from bench.quality import plots, tables

    if options.json is not None:
        results.write(found, options.json)
    variants = results.rounded(found)["variants"]
    print(f"\n{tables.report(variants)}", flush=True)
    if options.plot is not None:
        pictures.announced(lambda: plots.write(variants, found["title"], options.plot))
