"""Sweeps in pictures: a line per variant, and dotted what its design says."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import pictures
from bench.memory.growth import Curve
from bench.memory.tables import MEASURES, SAVED, expected
from bench.results import lettered
from xsmoe.report.style import CYCLE

TITLES = {
    "saved": "Saved for backward",
    "peak": "Peak of a step beyond its inputs",
    "resident": "Peak of the process beyond its inputs",
}
WORDS = {"N": "rows", "E": "experts", "R": "rank", "D": "width", "B": "users", "M": "modalities"}


def write(curves: Sequence[Curve], machine: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes a PNG file for each sweep of several points, and returns where they are."""
    drawn = [curve for curve in curves if len(curve.cases) > 1]
    names = [f"memory-{curve.first.operator}-{curve.letter}" for curve in drawn]
    # With other sizes swept too, a letter may have several curves.
    unique = [f"{name}-{names[:place].count(name) + 1}" if names.count(name) > 1 else name
              for place, name in enumerate(names)]  # fmt: skip
    return [
        path
        for name, curve in zip(unique, drawn, strict=True)
        for path in pictures.write(partial(draw, curve, machine), folder / f"{name}.png")
    ]


def draw(curve: Curve, machine: Mapping[str, Any]) -> Any:
    """A panel for each measure that there is; None where nothing was measured."""
    shown = [one for one in MEASURES if one.name in TITLES and any(curve.points(v, one.of) for v in curve.variants)]
    if not shown:
        return None
    figure, panels = pictures.figure(len(shown))
    for panel, measure in zip(panels, shown, strict=True):
        for place, name in enumerate(curve.variants):
            colour = CYCLE[place % len(CYCLE)]
            points = curve.points(name, measure.of)
            panel.plot([x for x, _ in points], [y / 2**20 for _, y in points], "o-", color=colour, label=name)
            if measure is SAVED and (designed := curve.points(name, expected)):
                panel.plot([x for x, _ in designed], [y / 2**20 for _, y in designed], ":", color="black")
        panel.set(title=TITLES[measure.name], ylabel="MiB", xlabel=WORDS.get(curve.letter, curve.letter))
        panel.set(xlim=(0, None), ylim=(0, None))
    pictures.legend_below(figure, panels[0])
    first = curve.first
    figure.suptitle(f"{first.operator} {first.dtype} {lettered(curve.fixed)}; {pictures.device(machine)}")
    return figure
