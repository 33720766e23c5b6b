"""`python -m bench compare BEFORE.json AFTER.json`: what changed between two runs by more than the machine did."""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from bench import results
from bench.compare import CONFIDENCE, LEAST, Change, compare
from bench.machine import line


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "compare",
        help="two files of results: which rows of ours changed by more than the machine did",
        description="Compares two files that --json wrote. A row of ours has changed if its time moved against the "
        "rivals' of the same case, by more than the rounds' spread and by more than --least. The exit code is 1 if a "
        "row of ours became slower, or is measured in the first file and not in the second.",
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument("--least", type=float, default=LEAST, help=f"the smallest change that counts; {LEAST:g}")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the table and then the verdict; 1 if something became slower or was lost, 2 if a file cannot be read."""
    try:
        if not options.least > 0:
            raise ValueError(f"--least must be above 0, not {options.least:g}")
        before, after = _timed(options.before), _timed(options.after)
        lines = [f"{when} {line(one.machine)}" for when, one in (("before:", before), ("after: ", after))]
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m bench compare: {error}", file=sys.stderr)
        return 2
    found = compare(before, after, options.least)
    print("\n".join(lines), end="\n\n")
    for one in found.differences:
        print(f"**Not the same machine or set-up: {one}.**\n")
    if found.changes:
        print("\n".join(results.aligned(HEAD, [_cells(change) for change in found.changes])))
        print(
            "\nx machine: how many times longer the rivals, whose code is the same, took the second time. change: what "
            f"ours took beyond that, with the {CONFIDENCE:.0%} interval over the rounds."
        )
    if found.gaps:
        print("\nWhat only one of them measured; lost are rows of ours that the second has not:\n")
        print("\n".join(f"- {gap}" for gap in found.gaps))
    counts = Counter(change.verdict for change in found.changes)
    lost = sum(len(gap.lost) for gap in found.gaps)
    print(f"\n**{_verdict(counts, lost)}**")
    return 1 if counts["slower"] or lost or not found.changes else 0


def _verdict(counts: Mapping[str, int], lost: int) -> str:
    if not counts:
        return f"The two files have no row of ours in common; {lost} lost."
    told = {"slower": "slower", "faster": "faster", "same": "the same", "few rounds": "of too few rounds to tell"}
    return ", ".join(f"{counts.get(verdict, 0)} {words}" for verdict, words in told.items()) + f"; {lost} lost."


def _timed(path: Path) -> results.Run:
    """A run that has times."""
    run = results.load(path)
    if run.command[:1] == ["memory"]:
        raise ValueError(f"{path} is of `bench memory` and has no times; give files of `bench kernels` or `bench step`")
    return run


HEAD = ["case", "variant", "pass", "before ms", "after ms", "x machine", "change", "interval", ""]


def _cells(change: Change) -> list[str]:
    return [
        change.case,
        change.variant,
        change.one_pass,
        f"{change.before * 1e3:.4g}",
        f"{change.after * 1e3:.4g}",
        f"{change.machine:.2f}",
        f"{change.change - 1:+.1%}",
        f"{change.low - 1:+.1%} to {change.high - 1:+.1%}",
        change.verdict,
    ]
