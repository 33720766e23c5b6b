"""Where a rival is faster, by bench/results: `python -m bench.losing --write` lists it in docs/kernels.md."""

import argparse
import textwrap
from collections.abc import Sequence

from bench import results, standing
from bench.leaving import leave
from bench.machine import ROOT
from bench.results import Run

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- written by python -m bench.losing --write -->", "<!-- end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the list; with --write puts it where it belongs."""
    parser = argparse.ArgumentParser(prog="python -m bench.losing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--passes", action="store_true", help="lists passes of steps that are not slower as a whole")
    options = parser.parse_args(arguments)
    text = section(committed())
    print("\n".join(lost(committed(), steps=False)) if options.passes else text)
    if options.write:
        page = PAGE.read_text()
        begin, end = _marks(page)
        PAGE.write_text(f"{page[:begin]}\n{text}\n{page[end:]}")
    return 0


def committed() -> dict[str, Run]:
    """The results of CPUs that lie in the repository, by file name."""
    return {path.name: results.load(path) for path in sorted((ROOT / "bench" / "results").glob("*-cpu-*.json"))}


def found(page: str) -> str:
    """What a page says, between the marks.

    Raises:
        ValueError: it has no such marks.
    """
    begin, end = _marks(page)
    return page[begin:end].strip("\n")


def _marks(page: str) -> tuple[int, int]:
    """Where the first mark ends, and where the second one begins."""
    begin = page.find(BEGIN)
    end = page.find(END, begin)
    if begin < 0 or end < 0:
        raise ValueError(f"the page has no {BEGIN} with {END} behind it")
    return begin + len(BEGIN), end


def section(runs: dict[str, Run]) -> str:
    """A line for each whole step, or a sentence where there is none; then how many passes of other steps."""
    lines = lost(runs, steps=True)
    if lines:
        head = "**Open.** Whole steps in which a rival is faster than ours, by the median of the rounds' ratios:"
        lines = [head, "", *lines, ""]
    else:
        lines = ["In no whole step of the committed results is a rival faster than ours."]
    if passes := lost(runs, steps=False):
        lines.append(
            _filled(
                f"In {len(passes)} more comparisons a rival is faster in forward or backward, and not in the whole "
                "step; `python -m bench.losing --passes` lists them. Some are meant: the loss computes its gradients "
                "in its forward, and `ours-recompute` its activations again in its backward."
            )
        )
    return "\n".join(lines)


def lost(runs: dict[str, Run], *, steps: bool) -> list[str]:
    """A line for each row: of whole steps, or of passes of steps that are not slower as a whole."""
    return [
        _filled(f"- {standing.told(loss)} ([{name.removesuffix('.json')}](../bench/results/{name}))", "  ")
        for name, run in runs.items()
        for loss in standing.losses([run], steps=steps)
    ]


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 136, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    leave(main)
