"""Measured steps under the machine's measured ceilings: `python -m bench.roofline PICTURE RESULTS...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench import results
from bench.results import Case, Run


class Point(NamedTuple):
    """A variant of a case: the floor's FLOP for each of the floor's bytes, and such FLOP a second."""

    label: str
    variant: str
    intensity: float
    rate: float


class Ceilings(NamedTuple):
    """What the machine showed between the variants' runs."""

    flop: float
    bytes: float

    def at(self, intensity: float) -> float:
        """The most FLOP a second at so many FLOP a byte."""
        return min(self.flop, self.bytes * intensity)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("results", type=Path, nargs="+", help="files that `python -m bench kernels --json` wrote")
    options = parser.parse_args(arguments)
    runs = [results.load(path) for path in options.results if path.exists()]
    found = points(runs)
    if not found:
        print("python -m bench.roofline: no step with products was measured", file=sys.stderr)
        return 1
    draw(found, ceilings(runs), options.picture)
    return 0


def points(runs: Sequence[Run]) -> list[Point]:
    """One for each variant that was measured, of each case that has products."""
    found = []
    for case in _with_products(runs):
        flop, moved = sum(case.flop.values()), sum(case.bytes.values())
        sizes = " ".join(f"{letter}={size}" for letter, size in case.sizes.items() if letter in "NEM")
        for row in case.rows:
            timing = row.passes.get("both") or row.passes.get("forward")
            if timing is not None:
                label = f"{case.operator} {case.dtype} {sizes}"
                found.append(Point(label, row.variant, flop / moved, flop / timing.median))
    return found


def ceilings(runs: Sequence[Run]) -> Ceilings:
    """The highest that any case saw."""
    cases = _with_products(runs)
    return Ceilings(max(case.flop_rate for case in cases), max(case.byte_rate for case in cases))


def draw(found: Sequence[Point], roof: Ceilings, picture: Path) -> None:
    """Both axes logarithmic; a colour for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    ridge = roof.flop / roof.bytes
    intensities = [point.intensity for point in found]
    left, right = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    axes.plot([left, ridge, right], [roof.at(one) for one in (left, ridge, right)], color="black")
    axes.annotate(f"{roof.flop / 1e12:.3g} TFLOP/s", (right, roof.flop), ha="right", va="bottom")
    axes.annotate(f"{roof.bytes / 1e12:.3g} TB/s", (left, roof.at(left)), ha="left", va="bottom")
    for variant in dict.fromkeys(point.variant for point in found):
        mine = [point for point in found if point.variant == variant]
        axes.scatter([one.intensity for one in mine], [one.rate for one in mine], label=variant, s=18)
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte, of the least work", ylabel="FLOP/s")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(picture, dpi=140)
    pyplot.close(figure)


def _with_products(runs: Sequence[Run]) -> list[Case]:
    return [case for run in runs for case in run.cases if case.flop_rate and case.byte_rate and sum(case.flop.values())]


if __name__ == "__main__":
    sys.exit(main())
