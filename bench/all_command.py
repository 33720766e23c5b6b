"""`python -m bench all`: everything, into one folder and one table."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from bench import (
    kernels_command,
    memory_command,
    results,
    roofline_command,
    step_command,
    stream_command,
    summary,
)
from bench.arguments import UsageError, add_machine, check_machine, make_folder
from bench.memory.growth import curves
from bench.memory.tables import slopes
from bench.results import Run
from bench.stream import records, tables
from bench.stream.records import StreamRun


class Part(NamedTuple):
    """A command of `python -m bench` among those that `all` runs.

    Attributes:
        name: of its file of results, and of its folder of pictures.
        full, quick: its arguments, beside device, dtype, threads, file and folder.
        left_out: what --quick does without.
        told: lines for the summary from its file, beside what the table says.
    """

    name: str
    command: ModuleType
    full: tuple[str, ...]
    quick: tuple[str, ...]
    left_out: str = ""
    told: Callable[[Path], list[str]] | None = None


def _of_stream(path: Path) -> list[str]:
    # The machine stands above, and what was settled in the table.
    return [line for line in tables.headline(records.load(path)) if not line.startswith("- machine: ")]


def _of_memory(path: Path) -> list[str]:
    return ["How memory grows:", "", *slopes(curves(results.load(path).cases)).splitlines(), ""]


PARTS = (
    Part(
        "kernels",
        kernels_command,
        ("--seconds", "4"),
        ("--quick", "--seconds", "0.5", "--sizes", "E=10"),
        "all sizes but one of each operator",
    ),
    Part(
        "step",
        step_command,
        ("--seconds", "20"),
        ("mean", "--quick", "--sizes", "B=128", "--seconds", "2", "--variants", "published,plain,ours"),
        "torch.compile of the published step, [CLS] pooling, and the paper's 256 users",
    ),
    Part(
        "memory",
        memory_command,
        ("side_moe", "step"),
        ("side_moe", "--quick", "--sizes", "R=64", "--variants", "naive,eager,ours,ours-recompute"),
        "the paper's number of rows, growth with the rank, and whole steps",
        _of_memory,
    ),
    Part(
        "stream",
        stream_command,
        (),
        ("--quick", "--windows", "4", "--epochs", "1"),
        "the paper's sizes, and growth to ten experts",
        _of_stream,
    ),
)


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "all",
        help="all of it: operators, steps, a stream and the roofline, into a folder, with one table at the end",
        description="How much faster, how much less memory, how far from the limit, compared with what, on which "
        "machine: runs the other commands, and leaves their files, their pictures and summary.md in a folder. After "
        "Ctrl-C what was done stays, and its summary is written. The exit code is 1 if a result was wrong or a part "
        "failed.",
    )
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds; under five minutes on two cores")
    add_machine(parser, ("float32", "bfloat16"))
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="by default a new one in runs/bench")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the parts; 1 if a result was wrong or a part failed, 2 if the command line is wrong, 130 after Ctrl-C."""
    try:
        folder = _checked(options)
    except UsageError as error:
        print(f"python -m bench all: {error}", file=sys.stderr)
        return 2
    begin, codes, parts = time.monotonic(), list[int](), list[str]()
    for place, part in enumerate(PARTS):
        print(f"\n# {part.name}, {place + 1} of {len(PARTS) + 1}\n", flush=True)
        codes.append(_run(part.command, _arguments(part, options, folder), parts))
        if options.quick and part.left_out:
            parts[-1] += f"; left out of --quick: {part.left_out}"
        if codes[-1] == 130:
            break
    else:
        print(f"\n# roofline, {len(PARTS) + 1} of {len(PARTS) + 1}\n", flush=True)
        if files := [str(path) for path, _ in _runs(folder)]:
            codes.append(_run(roofline_command, ["roofline", *files, "--plot", str(folder / "roofline.png")], parts))
        else:
            parts.append("- roofline: nothing to show")
    parts.append(f"- all of it took {(time.monotonic() - begin) / 60:.1f} minutes")
    found = report(folder, parts)
    (folder / "summary.md").write_text(found)
    print(f"\n{found}\nFiles, pictures and this table (summary.md): {folder}", flush=True)
    return 130 if 130 in codes else int(any(codes))


def report(folder: Path, parts: list[str]) -> str:
    """The summary of what lies in a folder."""
    told = [
        line
        for part in PARTS
        if part.told is not None and _written(folder / f"{part.name}.json")
        for line in part.told(folder / f"{part.name}.json")
    ]
    return summary.report([run for _, run in _runs(folder)], _streams(folder), told, parts)


def _checked(options: argparse.Namespace) -> Path:
    """The folder, made; what was measured before is never mixed with what is measured now."""
    check_machine(options.device, options.threads)
    now = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder: Path = options.folder or Path("runs/bench") / f"{now}-{options.device}-{options.dtype}"
    make_folder("--folder", folder)
    for name in ("summary.md", *(f"{part.name}.json" for part in PARTS)):
        if (folder / name).exists():
            raise UsageError(f"--folder: {folder / name} is there already; name another folder, or move it away")
    return folder


def _arguments(part: Part, options: argparse.Namespace, folder: Path) -> list[str]:
    _, _, name = part.command.__name__.rpartition(".")
    given = [name.removesuffix("_command"), *(part.quick if options.quick else part.full)]
    given += ["--device", options.device, "--dtype", options.dtype]
    given += ["--threads", str(options.threads)] if options.threads is not None else []
    return [*given, "--json", str(folder / f"{part.name}.json"), "--plot", str(folder / part.name)]


def _run(command: ModuleType, given: list[str], parts: list[str]) -> int:
    """Runs a command as `python -m bench` would; what fails does not stop the rest."""
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
        # Nobody reads any more, so no other part can say anything either.
        raise
    except Exception as error:
        traceback.print_exc()
        code, ended = 1, f"FAILED: {type(error).__name__}: {error}"
    parts.append(f"- `python -m bench {' '.join(given)}` {ended} after {time.monotonic() - begin:.0f} s")
    return code


def _runs(folder: Path) -> list[tuple[Path, Run]]:
    """What lies in the folder of operators and steps."""
    return [(path, results.load(path)) for path in _files(folder) if '"cases"' in path.read_text()]


def _streams(folder: Path) -> list[StreamRun]:
    return [records.load(path) for path in _files(folder) if f'"kind": "{records.KIND}"' in path.read_text()]


def _files(folder: Path) -> list[Path]:
    return [path for part in PARTS if _written(path := folder / f"{part.name}.json")]


def _written(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
