"""`python -m bench compare BEFORE.json AFTER.json`: the changes of our rows between two runs."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from bench.core import results
from bench.core.machine import line
from bench.report.comparison import CONFIDENCE, MIN_CHANGE, compare
from bench.report.tables import markdown_table


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "compare",
        help="two result files: which of our rows changed by more than the machine did",
        description="Compares two files that --json wrote. One of our rows has changed if its time moved relative to "
        "the baselines of the same case, by more than the spread of the rounds and by more than --least. The exit code "
        "is 1 if one of our rows became slower, or is measured in the first file and not in the second.",
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument("--least", type=float, default=MIN_CHANGE, help=f"smallest change that counts; {MIN_CHANGE:g}")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table and then the verdict; return 1 if a row is slower or lost, 2 if a file cannot be read."""
    try:
        if not options.least > 0:
            raise ValueError(f"--least must be above 0, not {options.least:g}")
        before, after = _load(options.before), _load(options.after)
        lines = [f"{when} {line(one.machine)}" for when, one in (("before:", before), ("after: ", after))]
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m bench compare: {error}", file=sys.stderr)
        return 2
    found = compare(before, after, options.least)
    print("\n".join(lines), end="\n\n")
    for one in found.differences:
        print(f"**Not the same machine or set-up: {one}.**\n")
    if found.changes:
        head = ["case", "variant", "pass", "before ms", "after ms", "x machine", "change", "interval", ""]
        body = [
            [change.case, change.variant, change.one_pass, f"{change.before * 1e3:.4g}", f"{change.after * 1e3:.4g}",
             f"{change.machine:.2f}", f"{change.change - 1:+.1%}", f"{change.low - 1:+.1%} to {change.high - 1:+.1%}",
             change.verdict]
            for change in found.changes
        ]  # fmt: skip
        print("\n".join(markdown_table(head, body)))
        print(
            "\nx machine: the time of the baselines, whose code is the same, in the second run relative to the first. "
            f"change: the change of our time beyond that, with the {CONFIDENCE:.0%} interval over the rounds."
        )
    if found.gaps:
        print("\nMeasured in one of the files only; lost are our rows that the second file lacks:\n")
        print("\n".join(f"- {gap}" for gap in found.gaps))
    counts = Counter(change.verdict for change in found.changes)
    lost = sum(len(gap.lost) for gap in found.gaps)
    text = "The two files have none of our rows in common"
    if counts:
        words = {
            "slower": "slower",
            "faster": "faster",
            "same": "the same",
            "few rounds": "with too few rounds to tell",
        }
        text = ", ".join(f"{counts[verdict]} {word}" for verdict, word in words.items())
    print(f"\n**{text}; {lost} lost.**")
    return 1 if counts["slower"] or lost or not found.changes else 0


def _load(path: Path) -> results.Run:
    """Return a run that has times."""
    run = results.load(path)
    if run.command[:1] == ["memory"]:
        raise ValueError(f"{path} is of `bench memory` and has no times; give files of `bench kernels` or `bench step`")
    return run
