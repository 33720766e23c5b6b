"""`python -m bench all`: all commands, with their results in one folder and one table."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from bench.cli import kernels, memory, roofline, step, stream
from bench.cli.common import UsageError, add_machine, check_machine, make_folder
from bench.core import results
from bench.e2e.memory.curves import curves
from bench.e2e.memory.report import slope_table
from bench.e2e.stream import records, report
from bench.report import summary


class Part(NamedTuple):
    """A command of `python -m bench` that `all` runs.

    Attributes:
        name: the command, and the name of its result file and of its folder of plots.
        command: its module.
        full, quick: its arguments, without device, dtype, threads, file and folder.
        left_out: what --quick leaves out.
        notes: returns lines for the summary from its result file.
    """

    name: str
    command: ModuleType
    full: tuple[str, ...]
    quick: tuple[str, ...]
    left_out: str = ""
    notes: Callable[[Path], list[str]] | None = None


def _stream_notes(path: Path) -> list[str]:
    # The summary has a line for the machine.
    return [line for line in report.headline(records.load(path)) if not line.startswith("- machine: ")]


def _memory_notes(path: Path) -> list[str]:
    return ["Growth of memory:", "", *slope_table(curves(results.load(path).cases)).splitlines(), ""]


PARTS = (
    Part(
        "kernels",
        kernels,
        ("--seconds", "4"),
        ("--quick", "--seconds", "0.5", "--sizes", "E=10"),
        "all sizes but one of each operator",
    ),
    Part(
        "step",
        step,
        ("--seconds", "20"),
        ("mean", "--quick", "--sizes", "B=128", "--seconds", "2", "--variants", "published,plain,ours"),
        "torch.compile of the published step, [CLS] pooling, and the paper's 256 users",
    ),
    Part(
        "memory",
        memory,
        ("side_moe", "step"),
        ("side_moe", "--quick", "--sizes", "R=64", "--variants", "naive,eager,ours,ours-recompute"),
        "the paper's number of rows, growth with the rank, and whole steps",
        _memory_notes,
    ),
    Part(
        "stream",
        stream,
        (),
        ("--quick", "--windows", "4", "--epochs", "1"),
        "the paper's sizes, and growth to ten experts",
        _stream_notes,
    ),
)


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "all",
        help="operators, steps, memory, a stream and the roofline, in one folder, with one table at the end",
        description="Runs the other commands, and writes their result files, their plots and summary.md into a folder. "
        "The summary has speed-ups, memory, the distance from the limit, the baselines and the machine. After Ctrl-C "
        "the finished parts remain, and their summary is written. The exit code is 1 if a result was wrong or a part "
        "failed.",
    )
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds; under five minutes on two cores")
    add_machine(parser, ("float32", "bfloat16"))
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="default: a new one in runs/bench")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the parts; return 1 if a result was wrong or a part failed, 2 for a wrong command line, 130 after Ctrl-C."""
    try:
        folder = _checked_folder(options)
    except UsageError as error:
        print(f"python -m bench all: {error}", file=sys.stderr)
        return 2
    begin, codes, endings = time.monotonic(), list[int](), list[str]()
    for place, part in enumerate(PARTS):
        print(f"\n# {part.name}, {place + 1} of {len(PARTS) + 1}\n", flush=True)
        codes.append(_run(part.command, arguments(part, options, folder), endings))
        if options.quick and part.left_out:
            endings[-1] += f"; left out of --quick: {part.left_out}"
        if codes[-1] == 130:
            break
    else:
        print(f"\n# roofline, {len(PARTS) + 1} of {len(PARTS) + 1}\n", flush=True)
        if files := [str(path) for path in _files(folder) if '"cases"' in path.read_text()]:
            codes.append(_run(roofline, ["roofline", *files, "--plot", str(folder / "roofline.png")], endings))
        else:
            endings.append("- roofline: nothing to show")
    endings.append(f"- all parts took {(time.monotonic() - begin) / 60:.1f} minutes")
    text = summarize(folder, endings)
    (folder / "summary.md").write_text(text)
    print(f"\n{text}\nFiles, plots and this table (summary.md): {folder}", flush=True)
    return 130 if 130 in codes else int(any(codes))


def summarize(folder: Path, endings: list[str]) -> str:
    """Return the summary of a folder's result files."""
    files = _files(folder)
    notes = [line for part in PARTS if part.notes for path in files if path.stem == part.name
             for line in part.notes(path)]  # fmt: skip
    return summary.report([records.load_any(path) for path in files], notes, endings)


def arguments(part: Part, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line of a part."""
    given = [
        part.command.__name__.rpartition(".")[2],
        *(part.quick if options.quick else part.full),
    ]
    given += ["--device", options.device, "--dtype", options.dtype]
    given += ["--threads", str(options.threads)] if options.threads is not None else []
    return [*given, "--json", str(folder / f"{part.name}.json"), "--plot", str(folder / part.name)]


def _checked_folder(options: argparse.Namespace) -> Path:
    """Return the new folder. Earlier results are never mixed with new ones."""
    check_machine(options.device, options.threads)
    now = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder: Path = options.folder or Path("runs/bench") / f"{now}-{options.device}-{options.dtype}"
    make_folder("--folder", folder)
    for name in ("summary.md", *(f"{part.name}.json" for part in PARTS)):
        if (folder / name).exists():
            raise UsageError(f"--folder: {folder / name} exists already; name another folder, or move it away")
    return folder


def _run(command: ModuleType, given: list[str], endings: list[str]) -> int:
    """Run a command like `python -m bench`. A failure does not stop the other parts."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    command.add_to(parser.add_subparsers(required=True))
    begin, ended = time.monotonic(), "ended"
    try:
        options = parser.parse_args(given)
        options.given = given
        code = int(options.run(options))
        if code:
            ended = "interrupted" if code == 130 else f"ended with exit code {code}"
    except KeyboardInterrupt:
        code, ended = 130, "interrupted"
    except BrokenPipeError:
        # The reader is gone, so the other parts cannot print either.
        raise
    except Exception as error:
        traceback.print_exc()
        code, ended = 1, f"FAILED: {type(error).__name__}: {error}"
    endings.append(f"- `python -m bench {' '.join(given)}` {ended} after {time.monotonic() - begin:.0f} s")
    return code


def _files(folder: Path) -> list[Path]:
    """Return the result files of the parts that wrote one."""
    paths = (folder / f"{part.name}.json" for part in PARTS)
    return [path for path in paths if path.exists() and path.stat().st_size > 0]
