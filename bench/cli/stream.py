"""`python -m bench stream`: a whole stream through the paper's formulation and ours."""

import argparse
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from bench.cli.common import UsageError, begin, check_file, check_machine, make_folder, progress
from bench.e2e.stream import records, report
from bench.e2e.stream.records import StreamRun, WindowRecord
from bench.e2e.stream.settings import POOLINGS, Settings
from bench.e2e.stream.step_clock import PARTS

QUICK = {"users": 256, "items": 1000, "new_items": 100, "batch": 64}
_NUMBERS = {
    "users": (2, "active users of each window"),
    "items": (0, "items at the start; at least 16 for each window"),
    "new_items": (0, "new items of each later window"),
    "windows": (2, "number of windows; each adds an expert to every level"),
    "epochs": (1, "of each window"),
    "batch": (2, "users per step"),
    "dim": (1, "D, width of the hidden states"),
    "rank": (1, "R, width of an expert"),
    "seed": (0, "of the stream, weights, batch order and dropout"),
    "top_k": (1, "add a run of ours with routing to K experts"),
    "threads": (1, "of torch; the default is torch's"),
}


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "stream",
        help="a stream through the paper's formulation and ours: time, memory and quality as experts grow",
        description="Trains the paper's formulation and ours on the same stream, with equal initial weights, batches, "
        "epochs and tests, one epoch each in turn. Every window adds an expert, and none is dropped. A run with a "
        "wrong step gets no time, and makes the exit code 1. docs/benchmarking.md explains the tables.",
    )
    defaults = asdict(Settings())
    for name, (_, text) in _NUMBERS.items():
        quick = f", quick {QUICK[name]}" if name in QUICK else ""
        shown = "" if defaults.get(name) is None else f"; {defaults[name]}{quick}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text + shown)
    parser.add_argument("--quick", action="store_true", help="a smaller stream and smaller batches")
    parser.add_argument("--pooling", choices=POOLINGS, help="cls: all items share one row at level 0; mean")
    parser.add_argument("--dropout", type=float, help=f"in the user encoder; {Settings.dropout:g}")
    parser.add_argument("--lr", type=float, help=f"of Adam; {Settings.lr:g}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 is autocast; float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu")
    parser.add_argument("--graph", action="store_true", help="ours as CUDA graphs, without times of parts")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results, after every window")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw time, memory, quality and parts (matplotlib)")
    parser.add_argument("--show", type=Path, metavar="PATH", help="measure nothing; show a file of --json")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Stream and print; return 1 if a step was wrong, 2 if the command line is wrong, 130 after Ctrl-C."""
    try:
        if options.show is not None:
            return _show(records.load(options.show), options.plot)
        settings = settings_of(options)
        check_file("--json", options.json)
        make_folder("--plot", options.plot)
    except BrokenPipeError:
        raise
    except (UsageError, OSError, ValueError, KeyError) as error:
        print(f"python -m bench stream: {error}", file=sys.stderr)
        return 2
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
                records.save(found(), options.json)
    except KeyboardInterrupt:
        stopped = True
    print()
    code = _show(records.as_saved(found()), options.plot) if windows else 0
    return 130 if stopped else code


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the checked settings of the command line.

    Raises:
        UsageError: an argument out of its range.
    """
    for name, (least, _) in _NUMBERS.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    given = {one.name: value for one in fields(Settings) if (value := getattr(options, one.name)) is not None}
    settings = replace(Settings(), **(QUICK if options.quick else {}) | given)
    if settings.items < 16 * settings.windows:
        raise UsageError(
            f"--items must be at least 16 for each of the {settings.windows} windows, that is "
            f"{16 * settings.windows}, not {settings.items}: a user interacts with an item only once"
        )
    if not 0 <= settings.dropout < 1:
        raise UsageError(f"--dropout must be in [0, 1), not {settings.dropout:g}")
    if not settings.lr > 0:
        raise UsageError(f"--lr must be above 0, not {settings.lr:g}")
    check_machine(settings.device)
    if settings.graph and settings.device != "cuda":
        raise UsageError("--graph: CUDA graphs need --device cuda")
    return settings


def _show(found: StreamRun, folder: Path | None) -> int:
    print(report.report(found), flush=True)
    if folder is not None:
        from bench.e2e.stream.plots import write_plots
        from bench.report.plots import draw_and_print

        draw_and_print(lambda: write_plots(found, folder))
    for window, name, reason in found.refused():
        print(f"refused: {name} in window {window}: {reason}", file=sys.stderr)
    return 1 if found.refused() else 0
