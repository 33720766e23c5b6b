"""What bench/gpu_suite.sh found, in short: `python -m bench.gpu_summary FOLDER`."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench import results, standing
from bench.leaving import leave
from bench.measure import quantiles
from bench.memory.growth import curves
from bench.memory.tables import slopes
from bench.results import Row, Run
from bench.stream import records
from bench.stream.records import StreamRun
from xsmoe_kernels.backends import cuda as cuda_backend

_STATE = ".gpu_suite"
_MARKS = {"passed": "passed in ", "failed": "FAILED: ", "absent": "left out: "}
# Variants that compute in float32 whatever the dtype of the case.
_WIDE = ("naive",)
_COUNTS = ("tests", "failures", "errors", "skipped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables, or why there are no CUDA kernels."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_summary", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench/results"))
    parser.add_argument("--no-cuda-kernels", action="store_true", help="why there are none; exit code 1 if there are")
    parser.add_argument("--commit", help="leaves out what is of another commit")
    options = parser.parse_args(arguments)
    if options.no_cuda_kernels:
        if reason := cuda_backend.describe().get("unavailable"):
            print(reason)
        return 0 if reason else 1
    ran, found = parts(options.folder / _STATE, options.commit), list(measured(options.folder, options.commit))
    runs = [run for run in found if isinstance(run, Run)]
    streamed = [run for run in found if isinstance(run, StreamRun)]
    timed, swept = ([run for run in runs if _of_memory(run) == memory] for memory in (False, True))
    print("\n\n".join(filter(None, (ran, speeds(timed), growths(swept), streams(streamed)))))
    return 0


def parts(state: Path, commit: str | None = None) -> str:
    """A row for each part that ended, with its tests; only those of a commit, if one is given."""
    rows = []
    for path in sorted(state.glob("*.*"), key=lambda path: path.stat().st_mtime):
        name, mark = path.stem, path.suffix.removeprefix(".")
        if mark not in _MARKS:
            continue
        of, _, said = path.read_text().strip().partition(" ")
        if commit is None or of == commit:
            rows.append([name, _MARKS[mark] + said, "" if mark == "absent" else tests(state / f"{name}.xml")])
    return "\n".join(results.aligned(["part", "state", "tests"], rows)) if rows else ""


def tests(path: Path) -> str:
    """How many tests passed, failed and were skipped, from what pytest wrote."""
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return ""
    total, failures, errors, skipped = (sum(int(suite.get(name, 0)) for suite in suites) for name in _COUNTS)
    failed = failures + errors
    return f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped"


def measured(folder: Path, commit: str | None = None) -> Iterator[Run | StreamRun]:
    """The runs on GPUs that lie in a folder; only those of a commit, if one is given."""
    for path in sorted(folder.glob("*.json")):
        try:
            run = _load(path)
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
    """A row for each of our variants of each case: speed against rivals, share of the floor, memory."""
    cases = [case for run in runs for case in run.cases if case.device == "cuda"]
    rivals = list(dict.fromkeys(row.variant for case in cases for row in case.rows if not standing.ours(row)))
    body = []
    for case in cases:
        for row in filter(standing.ours, case.rows):
            label = [standing.label(case), standing.marked(row)]
            if row.status != "measured":
                body.append([*label, row.status, *[""] * len(rivals), "", "", ""])
                continue
            step = standing.whole(row)
            assert step is not None
            others = {rival.variant: rival for rival in standing.rivals(case, row)}
            against = [speedup(row, others.get(name)) for name in rivals]
            peaks = [results.mib(row.peak_bytes), leanest(others.values(), case.dtype)]
            body.append([*label, f"{step.median * 1e3:.3f}", *against, f"{step.share:.0%}", *peaks])
    head = ["case", "variant", "ms", *(f"x {name}" for name in rivals), "of floor", "peak MiB", "leanest rival's"]
    if not body:
        return ""
    marks = standing.explained(row for case in cases for row in case.rows)
    return "\n".join([*results.aligned(head, body), *([""] if marks else []), *marks])


def growths(runs: Iterable[Run]) -> str:
    """A row for each sweep and variant: how fast memory grows."""
    return slopes(curves(case for run in runs for case in run.cases if case.device == "cuda"))


def streams(runs: Iterable[StreamRun]) -> str:
    """A row for each formulation of each stream: its first and its last window, and how far the last one grew."""
    body = []
    for run in runs:
        label = "stream" + (", graphs" if run.settings.get("graph") else "")
        for name in run.names:
            done = [(window, record) for window in run.windows if (record := window.timed(name))]
            if not done:
                body.append([label, name, *[""] * 7])
                continue
            # The last window has no test after it.
            windows = [record.grow + sum(record.epochs) for _, record in done]
            steps = [1e3 * quantiles(record.step_seconds).median for _, record in done]
            experts = f"{done[0][0].experts} to {done[-1][0].experts}"
            body.append([label, name, experts, *_grown(steps), *_grown(windows)])
    if not body:
        return ""
    head = ["run", "formulation", "experts", "step ms", "in the end", "x", "window s", "in the end", "x"]
    return "\n".join(results.aligned(head, body))


def _grown(values: Sequence[float]) -> list[str]:
    return [f"{values[0]:.3g}", f"{values[-1]:.3g}", f"{values[-1] / values[0]:.2f}"]


def _load(path: Path) -> Run | StreamRun:
    kind = json.loads(path.read_text()).get("kind")
    return records.load(path) if kind == records.KIND else results.load(path)


def speedup(row: Row, rival: Row | None) -> str:
    """How many times faster a whole step is than a rival's: the median over the rounds."""
    if rival is None:
        return ""
    if rival.status != "measured":
        return rival.status
    found = standing.ratio(row, rival, standing.step(row))
    return "" if found is None else f"{found.median:.2f}"


def leanest(rivals: Iterable[Row], dtype: str) -> str:
    """The least peak of a rival of the same dtype, and whose it is."""
    peaks = [
        (row.peak_bytes, row.variant)
        for row in rivals
        if row.peak_bytes is not None and (dtype == "float32" or row.variant not in _WIDE)
    ]
    if not peaks:
        return ""
    least, name = min(peaks)
    return f"{results.mib(least)} ({name})"


def _of_memory(run: Run) -> bool:
    return run.command[:1] == ["memory"]


if __name__ == "__main__":
    leave(main)
