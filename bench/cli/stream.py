"""`python -m bench stream`: a whole stream through the paper's formulation and ours."""

import argparse
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch

from bench.cli.common import UsageError, add_machine, begin, check_file, check_machine, make_folder, progress
from bench.core import results
from bench.e2e.stream import records, report
from bench.e2e.stream.records import PARTS, StreamRun, WindowRecord
from bench.e2e.stream.settings import Settings


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "stream",
        help="a stream through the paper's formulation and ours: time, memory and quality as experts grow",
        description="Trains the paper's formulation and ours on the same stream, with equal initial weights, batches, "
        "epochs and tests, one epoch each in turn. Every window adds an expert, and none is dropped. A run with a "
        "wrong step gets no time, and makes the exit code 1. docs/benchmarking.md explains the tables.",
    )
    for one in fields(Settings):
        if one.metadata:
            parser.add_argument(_flag(one.name), default=None, **one.metadata["argparse"])
    add_machine(parser, ("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="a smaller stream and smaller batches")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results, after every window")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw time, memory, quality and parts (matplotlib)")
    parser.add_argument("--show", type=Path, metavar="PATH", help="measure nothing; show a file of --json")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Stream and print; return 1 if a step was wrong, and 130 after Ctrl-C."""
    if options.show is not None:
        try:
            shown = records.load(options.show)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--show: {error}") from None
        return _show(shown, options.plot)
    settings = settings_of(options)
    check_file("--json", options.json)
    make_folder("--plot", options.plot)
    # Imported here because other commands of the bench do not need xsmoe's dependencies.
    from bench.e2e.stream.data import generate_stream
    from bench.e2e.stream.windows import StreamBenchmark

    started = time.monotonic()
    facts = begin(torch.device(settings.device), options.threads, timed=True)
    say, windows, stopped = progress(started), list[WindowRecord](), False

    def found() -> StreamRun:
        seconds = time.monotonic() - started
        return StreamRun(options.given, facts, asdict(settings), list(PARTS), settings.names, windows, seconds)

    print("\nThe paper's formulation and ours, one epoch each in turn; each line is a window:\n", flush=True)
    try:
        say("generating the stream")
        for window in StreamBenchmark(settings, generate_stream(settings), say).windows():
            windows.append(window)
            say("")
            print(f"- {report.window_line(window, settings.names)}", flush=True)
            # After every window, so that an interruption loses only the running window.
            if options.json is not None:
                results.save(found(), options.json)
    except KeyboardInterrupt:
        stopped = True
    print()
    code = _show(results.as_saved(found()), options.plot) if windows else 0
    return 130 if stopped else code


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the checked settings of the command line.

    Raises:
        UsageError: an argument out of its range.
    """
    found = {}
    for one in fields(Settings):
        quick, least = one.metadata.get("quick"), one.metadata.get("least")
        value = getattr(options, one.name)
        if value is None:
            value = quick if options.quick and quick is not None else one.default
        elif least is not None and value < least:
            raise UsageError(f"{_flag(one.name)} must be at least {least}, not {value}")
        found[one.name] = value
    settings = Settings(**found)
    if settings.items < 16 * settings.windows:
        raise UsageError(
            f"--items must be at least 16 for each of the {settings.windows} windows, that is "
            f"{16 * settings.windows}, not {settings.items}: a user interacts with an item only once"
        )
    if not 0 <= settings.dropout < 1:
        raise UsageError(f"--dropout must be in [0, 1), not {settings.dropout:g}")
    if not settings.lr > 0:
        raise UsageError(f"--lr must be above 0, not {settings.lr:g}")
    check_machine(settings.device, options.threads)
    if settings.graph and settings.device != "cuda":
        raise UsageError("--graph: CUDA graphs need --device cuda")
    return settings


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _show(found: StreamRun, folder: Path | None) -> int:
    print(report.report(found), flush=True)
    if folder is not None:
        from bench.e2e.stream.plots import write_plots
        from bench.report.plots import draw_and_print

        draw_and_print(lambda: write_plots(found, folder))
    for window, name, reason in found.refused():
        print(f"refused: {name} in window {window}: {reason}", file=sys.stderr)
    return 1 if found.refused() else 0
