"""A short summary of the results of bench/gpu/suite.sh: `python -m bench.gpu.summary FOLDER`."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench.cli.broken_pipe import run_and_exit
from bench.core import results
from bench.core.results import Row, Run
from bench.core.timing import quantiles
from bench.e2e.memory.curves import curves
from bench.e2e.memory.report import slope_table
from bench.e2e.stream import records
from bench.e2e.stream.records import StreamRun
from bench.report.comparison import baselines, problem_notes, speedup
from bench.report.tables import markdown_table, mib
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
    found = list(measured(options.folder, options.commit))
    runs = [run for run in found if isinstance(run, Run)]
    timed, swept = ([run for run in runs if (run.command[:1] == ["memory"]) == memory] for memory in (False, True))
    growth = slope_table(curves(case for run in swept for case in run.cases if case.device == "cuda"))
    streamed = streams(run for run in found if isinstance(run, StreamRun))
    sections = parts(options.folder / _STATE, options.commit), speeds(timed), growth, streamed
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


def measured(folder: Path, commit: str | None = None) -> Iterator[Run | StreamRun]:
    """Yield the GPU runs of a folder; only those of a commit, if one is given."""
    for path in sorted(folder.glob("*.json")):
        try:
            is_stream = json.loads(path.read_text()).get("kind") == records.KIND
            run = records.load(path) if is_stream else results.load(path)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            print(f"{path.name} is left out: {error}", file=sys.stderr)
            continue
        devices = [case.device for case in run.cases] if isinstance(run, Run) else [run.settings["device"]]
        if "cuda" not in devices:
            continue
        if commit is not None and run.machine.get("commit") != commit:
            print(f"{path.name} is left out: it is of commit {run.machine.get('commit')}", file=sys.stderr)
            continue
        yield run


def speeds(runs: Iterable[Run]) -> str:
    """Return a row for each of our variants of each case: speed-ups, share of the bound, memory."""
    cases = [case for run in runs for case in run.cases if case.device == "cuda"]
    names = list(dict.fromkeys(row.variant for case in cases for row in case.rows if not row.ours))
    body = []
    for case in cases:
        for row in (row for row in case.rows if row.ours):
            if row.status != "measured" or row.step is None:
                body.append([case.label, row.label, row.status, *[""] * len(names), "", "", ""])
                continue
            others = {other.variant: other for other in baselines(case, row)}
            cells = [case.label, row.label, f"{row.step.median * 1e3:.3f}"]
            cells += [_speedup(row, others.get(name)) for name in names]
            body.append(
                [*cells, f"{row.step.of_bound:.0%}", mib(row.peak_bytes), _least_peak(others.values(), case.dtype)]
            )
    head = ["case", "variant", "ms", *(f"x {name}" for name in names), "of bound", "peak MiB", "least baseline's"]
    if not body:
        return ""
    notes = problem_notes(row for case in cases for row in case.rows)
    return "\n".join([*markdown_table(head, body), *([""] if notes else []), *notes])


def streams(runs: Iterable[StreamRun]) -> str:
    """Return a row for each formulation of each stream: its first and last window, and the growth of the last one."""
    body = []
    for run in runs:
        label = "stream" + (", graphs" if run.settings.get("graph") else "")
        for name in run.names:
            done = [(window, record) for window in run.windows if (record := window.timed(name))]
            if not done:
                body.append([label, name, *[""] * 7])
                continue
            # The last window has no test, so tests are not counted.
            windows = [record.grow + sum(record.epochs) for _, record in done]
            steps = [1e3 * quantiles(record.step_seconds).median for _, record in done]
            experts = f"{done[0][0].experts} to {done[-1][0].experts}"
            grown = [f"{v[0]:.3g} {v[-1]:.3g} {v[-1] / v[0]:.2f}".split() for v in (steps, windows)]
            body.append([label, name, experts, *grown[0], *grown[1]])
    if not body:
        return ""
    head = ["run", "formulation", "experts", "step ms", "in the end", "x", "window s", "in the end", "x"]
    return "\n".join(markdown_table(head, body))


def _speedup(row: Row, baseline: Row | None) -> str:
    """Return the speed-up over a baseline in a whole step, or the baseline's status."""
    if baseline is None or baseline.status != "measured":
        return "" if baseline is None else baseline.status
    found = speedup(row, baseline, row.step_pass)
    return "" if found is None else f"{found.median:.2f}"


def _least_peak(rows: Iterable[Row], dtype: str) -> str:
    """Return the least peak of a baseline with inputs of the case's dtype, and its name."""
    peaks = [(row.peak_bytes, row.variant) for row in rows if row.peak_bytes and row.dtype in (None, dtype)]
    if not peaks:
        return ""
    least, name = min(peaks)
    return f"{mib(least)} ({name})"


if __name__ == "__main__":
    run_and_exit(main)
