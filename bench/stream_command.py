"""`python -m bench stream`: a whole stream through the published formulation and through ours."""

import argparse
import sys
import time
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import torch

from bench import pictures
from bench.arguments import UsageError, check_machine, make_file, make_folder
from bench.session import begin, speaker
from bench.stream import plots, records, tables
from bench.stream.parts import PARTS
from bench.stream.records import StreamRun, WindowRecord
from bench.stream.settings import POOLINGS, Settings, names

QUICK = {"users": 256, "items": 1000, "new_items": 100, "batch": 64}
_NUMBERS = {
    "users": (2, "active in each window"),
    "items": (0, "on sale at the start; at least 16 for each window"),
    "new_items": (0, "that arrive with each later window"),
    "windows": (2, "trained on one after the other; each adds an expert to every level"),
    "epochs": (1, "of each window"),
    "batch": (2, "users a step"),
    "dim": (1, "D, width of the hidden states"),
    "rank": (1, "R, width of an expert"),
    "seed": (0, "of the stream, weights, batch order and dropout"),
    "top_k": (1, "adds a run of ours whose rows go to the K best experts only"),
    "threads": (1, "of torch; by default what torch takes"),
}


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "stream",
        help="a stream through the published formulation and ours: time, memory and quality as experts grow",
        description="Trains the published formulation and ours on the same stream, with equal first weights, batches, "
        "epochs and tests, an epoch in turn. Every window adds an expert, and none is dropped. A run whose step is "
        "wrong gets no time, and makes the exit code 1. docs/benchmarking.md says how to read the tables.",
    )
    for name, (_, text) in _NUMBERS.items():
        given = _default(name)
        quick = f", quick {QUICK[name]}" if name in QUICK else ""
        shown = "" if given is None else f"; {given}{quick}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text + shown)
    parser.add_argument("--quick", action="store_true", help="a smaller stream and smaller batches")
    parser.add_argument("--pooling", choices=POOLINGS, help="cls: level 0 is one row for all items; mean")
    parser.add_argument("--dropout", type=float, help=f"in the user encoder; {Settings.dropout:g}")
    parser.add_argument("--lr", type=float, help=f"of Adam; {Settings.lr:g}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 is autocast; float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu")
    parser.add_argument("--graph", action="store_true", help="ours as CUDA graphs, whose parts are not told apart")
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes everything, after every window")
    parser.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="draws time, memory, quality and parts (matplotlib)"
    )
    parser.add_argument("--show", type=Path, metavar="PATH", help="measures nothing, and shows what --json wrote")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Streams and prints; returns 1 if a step was wrong, 2 if the command line is, 130 after Ctrl-C."""
    try:
        if options.show is not None:
            return _shown(records.load(options.show), options.plot)
        settings = settings_of(options)
        make_file("--json", options.json)
        make_folder("--plot", options.plot)
    except BrokenPipeError:
        raise
    except (UsageError, OSError, ValueError, KeyError) as error:
        print(f"python -m bench stream: {error}", file=sys.stderr)
        return 2
    # Only here, since all else of the bench goes without what these need.
    from bench.stream.streams import draw
    from bench.stream.windows import Streaming

    started = time.monotonic()
    facts = begin(torch.device(settings.device), options.threads, timed=True)
    say, windows, stopped = speaker(started), list[WindowRecord](), False

    def found() -> StreamRun:
        seconds = time.monotonic() - started
        return StreamRun(options.given, facts, asdict(settings), list(PARTS), names(settings), windows, seconds)

    print("\nPublished and ours, an epoch in turn; each line is a window:\n", flush=True)
    try:
        say("drawing the stream")
        for window in Streaming(settings, draw(settings), say).windows():
            windows.append(window)
            say("")
            print(f"- {tables.summary(window, names(settings))}", flush=True)
            # After every window, so that who is stopped loses only what was going on.
            if options.json is not None:
                records.save(found(), options.json)
    except KeyboardInterrupt:
        stopped = True
    print()
    code = _shown(records.as_saved(found()), options.plot) if windows else 0
    return 130 if stopped else code


def settings_of(options: argparse.Namespace) -> Settings:
    """What was asked for, checked.

    Raises:
        UsageError: an argument out of its range; the message names it.
    """
    for name, (least, _) in _NUMBERS.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    named = {one.name: getattr(options, one.name) for one in fields(Settings)}
    given = {name: value for name, value in named.items() if value is not None}
    settings = replace(Settings(), **(QUICK if options.quick else {}) | given)
    if settings.items < 16 * settings.windows:
        raise UsageError(
            f"--items must be at least 16 for each of the {settings.windows} windows, that is "
            f"{16 * settings.windows}, not {settings.items}: no user takes an item twice"
        )
    if not 0 <= settings.dropout < 1:
        raise UsageError(f"--dropout must lie in [0, 1), not {settings.dropout:g}")
    if not settings.lr > 0:
        raise UsageError(f"--lr must be above 0, not {settings.lr:g}")
    check_machine(settings.device)
    if settings.graph and settings.device != "cuda":
        raise UsageError("--graph: CUDA graphs need --device cuda")
    return settings


def _shown(found: StreamRun, folder: Path | None) -> int:
    print(tables.report(found), flush=True)
    if folder is not None:
        pictures.announced(lambda: plots.write(found, folder))
    for window, name, reason in found.refused():
        print(f"refused: {name} in window {window}: {reason}", file=sys.stderr)
    return 1 if found.refused() else 0


def _default(name: str) -> object:
    (found,) = [one.default for one in fields(Settings) if one.name == name] or [None]
    return None if found is MISSING else found
