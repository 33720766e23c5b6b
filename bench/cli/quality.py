"""`python -m bench quality`: recommendation quality of growth, conditioning, IDs and other choices, over seeds."""

import argparse
import sys
from pathlib import Path

import torch

from bench.cli.common import UsageError, begin, check_file, make_folder
from bench.core.results import rounded, write_json

STREAMS = ("catalogue", "returning")


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "quality",
        help="recommendation quality of model and training variants over seeds: means, errors, paired differences",
        description="Trains variants over seeds on one stream, and compares each with the base variant, the defaults, "
        "paired by seed and by user. A finished run is kept in the folder and not repeated, so the same command "
        "continues after Ctrl-C. docs/benchmarking.md explains the tables. The exit code is 1 if a run failed.",
    )
    parser.add_argument("--stream", choices=STREAMS, default="returning", help="a generated stream; returning")
    parser.add_argument("--dataset", type=Path, metavar="FOLDER", help="a prepared dataset instead, with --store")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="the dataset's hidden-state store")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="of data and runs; runs/quality")
    parser.add_argument("--variants", default="all", metavar="A,B", help="names, separated by commas; all")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="seeds 1 to N; 10")
    parser.add_argument("--windows", type=int, metavar="N", help="of the stream; default: its own, 10 for a dataset")
    parser.add_argument("--epochs", type=int, metavar="N", help="maximum epochs of a window; default: the stream's own")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes with one torch thread each; 1")
    parser.add_argument("--matrix", action="store_true", help="test every window's model on every window")
    parser.add_argument("--quick", action="store_true", help="a generated stream of 4 small windows, 3 epochs each")
    parser.add_argument("--list", action="store_true", help="describe the variants and run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all summaries")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the summaries into a PNG file (matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Perform the unfinished runs and print; return 1 if a run failed, 2 for a wrong command line, 130 after Ctrl-C."""
    try:
        _check(options)
        # Imported here because other commands of the bench do not need xsmoe's dependencies.
        from bench.e2e.quality import comparison, report
        from bench.e2e.quality.variants import VARIANTS, select_variants

        if options.list:
            for variant in VARIANTS.values():
                print(f"{variant.name}: {variant.sentence}")
            return 0
        try:
            variants = select_variants(options.variants)
        except ValueError as error:
            raise UsageError(f"--variants: {error}") from None
        facts = begin(torch.device("cpu"), None, timed=True)
        print()
        with comparison.processes(options.jobs) as executor:
            found, failures, stopped = comparison.compare(options, variants, executor, facts)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"python -m bench quality: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if found["variants"]:
        if options.json is not None:
            write_json(found, options.json)
        summaries = rounded(found)["variants"]
        print(f"\n{report.tables(summaries)}", flush=True)
        if options.plot is not None:
            from bench.report.plots import draw_and_print

            draw_and_print(lambda: report.write_plots(summaries, found["title"], options.plot))
    return 130 if stopped else int(failures > 0)


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError for an invalid option."""
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
    check_file("--json", options.json)
    check_file("--plot", options.plot)
