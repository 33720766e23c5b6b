"""What bench/gpu_suite.sh found, in short: `python -m bench.gpu_summary FOLDER`."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench import results
from bench.measure import quantiles
from bench.results import Row, Run

_STATE = ".gpu_suite"
_COUNTS = ("tests", "failures", "errors", "skipped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; with --gpu the GPU's name as it stands in file names, or nothing and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_summary", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("bench/results"))
    parser.add_argument("--gpu", action="store_true", help="prints what the GPU is called in file names")
    options = parser.parse_args(arguments)
    if options.gpu:
        if not torch.cuda.is_available():
            return 2
        print(short_name(torch.cuda.get_device_name()))
        return 0
    print("\n\n".join(filter(None, (parts(options.folder / _STATE), speeds(measured(options.folder))))))
    return 0


def short_name(gpu: str) -> str:
    """A GPU's name for file names: NVIDIA H200 is h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


def parts(state: Path) -> str:
    """A row for each part that ran, with its tests."""
    rows = []
    for log in sorted(state.glob("*.log"), key=lambda path: path.stat().st_mtime):
        failed, passed = state / f"{log.stem}.failed", sorted(state.glob(f"{log.stem}-*"))
        if failed.exists():
            rows.append([log.stem, f"FAILED: {failed.read_text().strip()}", tests(state / f"{log.stem}.xml")])
        elif passed:
            rows.append([log.stem, f"passed in {passed[-1].read_text().strip()}", tests(state / f"{log.stem}.xml")])
    rows += [[path.stem, f"left out: {path.read_text().strip()}", ""] for path in sorted(state.glob("*.absent"))]
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


def measured(folder: Path) -> Iterator[Run]:
    """The runs on GPUs that lie in a folder."""
    for path in sorted(folder.glob("*.json")):
        try:
            run = results.load(path)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            print(f"{path.name} is left out: {error}", file=sys.stderr)
            continue
        if any(case.device == "cuda" for case in run.cases):
            yield run


def speeds(runs: Iterator[Run]) -> str:
    """A row for each of our variants of each case: speed against rivals, share of the floor, memory."""
    cases = [case for run in runs for case in run.cases if case.device == "cuda"]
    rivals = list(dict.fromkeys(row.variant for case in cases for row in case.rows if not _ours(row)))
    body = []
    for case in cases:
        others = {row.variant: row for row in case.rows if not _ours(row)}
        for row in filter(_ours, case.rows):
            size = " ".join(f"{letter}={size}" for letter, size in case.sizes.items())
            label = [f"{case.operator} {case.dtype} {size}", row.variant]
            if row.status != "measured":
                body.append([*label, row.status, *[""] * len(rivals), "", "", ""])
                continue
            step = _step(row)
            against = [speedup(row, others.get(name)) for name in rivals]
            peaks = [_mib(row.peak_bytes), _mib(largest(others))]
            body.append([*label, f"{step.median * 1e3:.3f}", *against, f"{step.share:.0%}", *peaks])
    head = ["case", "variant", "ms", *(f"x {name}" for name in rivals), "of floor", "peak MiB", "naive's"]
    return "\n".join(results.aligned(head, body)) if body else ""


def speedup(row: Row, rival: Row | None) -> str:
    """How many times faster a whole step is than a rival's: the median over the rounds."""
    if rival is None:
        return ""
    if rival.status != "measured":
        return rival.status
    ratios = [theirs / ours for ours, theirs in zip(_step(row).samples, _step(rival).samples, strict=True)]
    return f"{quantiles(ratios).median:.2f}"


def largest(rivals: dict[str, Row]) -> int | None:
    """The most memory that a published formulation takes."""
    return max((row.peak_bytes or 0 for name, row in rivals.items() if name.startswith("naive")), default=0) or None


def _ours(row: Row) -> bool:
    return row.variant.startswith("ours")


def _step(row: Row) -> results.Timing:
    return row.passes.get("both") or row.passes["forward"]


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"


if __name__ == "__main__":
    sys.exit(main())
