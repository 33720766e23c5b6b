"""Slowdowns in bench/results: `python -m bench.report.slowdowns` lists them.

A slowdown is a pass in which one of our rows is slower than a baseline. `bench.report.docs_tables` writes the list into
docs/results.md.
"""

import argparse
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from bench.cli.broken_pipe import run_and_exit
from bench.core.machine import ROOT
from bench.core.results import Case, Row, Run, load_folder
from bench.core.timing import Quantiles
from bench.report.comparison import FEW_ROUNDS, baselines, speedup
from bench.report.tables import ms


class Slowdown(NamedTuple):
    """A pass in which our row is slower than a baseline, by the median of the rounds' ratios."""

    case: Case
    row: Row
    baseline: Row
    one_pass: str
    speedup: Quantiles

    def __str__(self) -> str:
        timing = self.row.passes[self.one_pass]
        mine, theirs = timing.median, self.baseline.passes[self.one_pass].median
        one_pass = "" if self.one_pass == self.row.step_pass else f", {self.one_pass}"
        return (
            f"{self.case.label}{one_pass}: {self.row.label} {self.speedup.median:.2f} times as fast as "
            f"{self.baseline.label} ({self.speedup.p10:.2f}-{self.speedup.p90:.2f}), {ms(mine)} and {ms(theirs)} ms"
            f"{few_rounds_note(timing.samples)}"
        )


def few_rounds_note(samples: Sequence[float]) -> str:
    """Return a note if so few rounds were timed that their median and ratios say little."""
    return f"; few rounds: {len(samples)}" if len(samples) < FEW_ROUNDS else ""


def slowdowns(runs: Sequence[Run], *, steps: bool) -> list[Slowdown]:
    """Return slowdowns of whole steps; or, with `steps` false, of passes of steps that are not slower."""
    found = []
    for case in (case for run in runs for case in run.cases):
        for row in (row for row in case.rows if row.ours):
            for baseline in baselines(case, row):
                slower = [
                    Slowdown(case, row, baseline, one, ratio)
                    for one in row.passes
                    if (ratio := speedup(row, baseline, one)) and ratio.median < 1
                ]
                step_slower = any(one.one_pass == row.step_pass for one in slower)
                found += [one for one in slower if (one.one_pass == row.step_pass if steps else not step_slower)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the list."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.slowdowns", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--passes", action="store_true", help="list passes of steps that are not slower as a whole")
    options = parser.parse_args(arguments)
    print("\n".join(lines(committed(), steps=False)) if options.passes else section(committed()))
    return 0


def committed() -> dict[str, Run]:
    """Return the committed CPU results, by file name."""
    return load_folder(ROOT / "bench" / "results")


def section(runs: dict[str, Run]) -> str:
    """Return a line for each whole step, or a sentence if there is none; then the number of passes of other steps."""
    found = lines(runs, steps=True)
    if found:
        head = "**Open.** Whole steps in which a baseline is faster than ours, by the median of the rounds' ratios:"
        found = [head, "", *found, ""]
    else:
        found = ["In no whole step of the committed results is a baseline faster than ours."]
    if passes := lines(runs, steps=False):
        found.append(
            _filled(
                f"In {len(passes)} more comparisons a baseline is faster in forward or backward, and not in the whole "
                "step; `python -m bench.report.slowdowns --passes` lists them. Some are intended: the loss computes "
                "its gradients in its forward, and `ours-recompute` computes its activations again in its backward."
            )
        )
    return "\n".join(found)


def lines(runs: dict[str, Run], *, steps: bool) -> list[str]:
    """Return a line for each slowdown, with a link to its file; `steps` as in `slowdowns`."""
    return [
        _filled(f"- {one} ([{name.removesuffix('.json')}](../bench/results/{name}))", "  ")
        for name, run in runs.items()
        for one in slowdowns([run], steps=steps)
    ]


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 136, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    run_and_exit(main)
