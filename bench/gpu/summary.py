"""A short summary of the results of bench/gpu/suite.sh: `python -m bench.gpu.summary FOLDER`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench.cli.broken_pipe import run_and_exit
from bench.core.results import Run
from bench.e2e.memory.curves import curves
from bench.e2e.memory.report import slope_table
from bench.e2e.stream import records
from bench.report import summary
from bench.report.comparison import problem_notes
from bench.report.tables import markdown_table
from xsmoe_kernels.backends import cuda as cuda_backend

_STATE = ".gpu_suite"
_MARKS = {"passed": "passed in ", "failed": "FAILED: ", "absent": "left out: "}
_COUNTS = ("tests", "failures", "errors", "skipped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or why there are no CUDA kernels."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.summary", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench/results"))
    parser.add_argument(
        "--no-cuda-kernels", action="store_true", help="print why there are none; exit code 1 if there are"
    )
    parser.add_argument("--commit", help="leave out parts and results of other commits")
    options = parser.parse_args(arguments)
    if options.no_cuda_kernels:
        if reason := cuda_backend.describe().get("unavailable"):
            print(reason)
        return 0 if reason else 1
    runs = list(measured(options.folder, options.commit))
    timed, swept = ([run for run in runs if (run.command[:1] == ["memory"]) == memory] for memory in (False, True))
    notes = problem_notes(row for run in timed for case in run.cases for row in case.rows)
    lines = summary.table(timed), notes, summary.missing(timed)
    growth = slope_table(curves(case for run in swept for case in run.cases))
    sections = [parts(options.folder / _STATE, options.commit), *map("\n".join, lines), growth]
    print("\n\n".join(filter(None, sections)))
    return 0


def parts(state: Path, commit: str | None = None) -> str:
    """Return a row for each finished part, with its tests; only those of a commit, if one is given."""
    rows = []
    for path in sorted(state.glob("*.*"), key=lambda path: path.stat().st_mtime):
        name, mark = path.stem, path.suffix.removeprefix(".")
        if mark not in _MARKS:
            continue
        of, _, message = path.read_text().strip().partition(" ")
        if commit is None or of == commit:
            rows.append([name, _MARKS[mark] + message, "" if mark == "absent" else tests(state / f"{name}.xml")])
    return "\n".join(markdown_table(["part", "state", "tests"], rows)) if rows else ""


def tests(path: Path) -> str:
    """Return the numbers of passed, failed and skipped tests in a file of pytest."""
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return ""
    total, failures, errors, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in _COUNTS)
    failed = failures + errors
    return f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped"


def measured(folder: Path, commit: str | None = None) -> Iterator[Run]:
    """Yield the GPU runs of a folder; only those of a commit, if one is given."""
    for path in sorted(folder.glob("*.json")):
        try:
            run = records.load_any(path)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            print(f"{path.name} is left out: {error}", file=sys.stderr)
            continue
        if not any(case.device == "cuda" for case in run.cases):
            continue
        if commit is not None and run.machine.get("commit") != commit:
            print(f"{path.name} is left out: it is of commit {run.machine.get('commit')}", file=sys.stderr)
            continue
        yield run


if __name__ == "__main__":
    run_and_exit(main)
