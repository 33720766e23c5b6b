"""Tables and plots of memory sweeps: bytes at each size, and their slope."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.core.results import Row, sizes_text
from bench.e2e.memory.curves import Curve, Line, fit
from bench.report import plots
from bench.report.tables import markdown_table, mib
from xsmoe.report.style import CYCLE

UNITS = {"N": "row", "E": "expert", "R": "unit of rank", "B": "user", "M": "modality", "D": "unit of width"}
AXES = {"N": "rows", "E": "experts", "R": "rank", "D": "width", "B": "users", "M": "modalities"}


class Measure(NamedTuple):
    """A number of bytes of a row: its name in tables, and the title of its panel, which is empty if it is not drawn."""

    name: str
    of: Callable[[Row], int | None]
    title: str = ""


def _peak_minus_results(row: Row) -> int | None:
    if row.peak_bytes is None or not row.returned_bytes:
        return None
    return max(0, row.peak_bytes - row.returned_bytes)


def expected(row: Row) -> int | None:
    """Return the saved activations by the variant's design."""
    return row.expected_saved_bytes


SAVED = Measure("saved", lambda row: row.saved_bytes, "Saved activations")
PEAK = Measure("peak", lambda row: row.peak_bytes, "Peak of a step beyond its inputs")
MEASURES = (
    SAVED,
    PEAK,
    Measure("peak minus results", _peak_minus_results),
    Measure("resident", lambda row: row.resident_bytes, "Peak of the process beyond its inputs"),
)


def curve_table(curve: Curve) -> str:
    """Return a sweep in Markdown: for each variant and measure the MiB at each size, the slope, and that by design."""
    head = ["variant", "MiB", *(f"{curve.letter} {value}" for value in curve.values), _per(curve), "by design"]
    body, notes = [], []
    for name in curve.variants:
        rows, label = curve.rows(name), name
        for measure in MEASURES:
            points = curve.points(name, measure.of)
            cells = {size: mib(held) for size, held in points}
            if measure is SAVED:
                cells |= {size: row.status for size, row in rows.items() if row.status != "measured"}
            if cells:
                designed = fit(curve.points(name, expected)) if measure is SAVED else None
                every = [cells.get(size, "") for size in curve.values]
                body.append([label, measure.name, *every, slope(fit(points)), slope(designed)])
                label = ""
        notes += _notes(curve.letter, name, rows)
    fixed = ", ".join(f"{letter} {size}" for letter, size in curve.fixed.items())
    over = f" over {curve.letter}" if len(curve.cases) > 1 else ""
    title = f"### memory of {curve.first.operator} {curve.first.dtype}{over}, {fixed}"
    return "\n".join([title, "", *markdown_table(head, body), "", *notes])


def _notes(letter: str, name: str, rows: Mapping[int, Row]) -> list[str]:
    errors = [row.error for row in rows.values() if row.status == "measured" and row.error is not None]
    notes = [f"- {name}: largest error {max(errors):.2f} of the reference's"] if errors else []
    places: dict[str, list[str]] = {}
    for size, row in rows.items():
        for text in (f"{row.status}: {row.reason}" if row.reason else None, row.remark):
            if text:
                places.setdefault(text, []).append(f"{letter} {size}")
    return notes + [f"- {name} at {', '.join(where)} {text}" for text, where in places.items()]


def slope_table(sweeps: Sequence[Curve]) -> str:
    """Return a row for each sweep and variant: the slopes of its saved activations and its peak."""
    body = []
    for curve in sweeps:
        label = f"{curve.first.operator} {curve.first.dtype} {sizes_text(curve.fixed)}"
        for name in curve.variants:
            saved, designed, peak = (slope(fit(curve.points(name, of))) for of in (SAVED.of, expected, PEAK.of))
            if saved or peak:
                body.append([label, _per(curve), name, saved, designed, peak])
    return "\n".join(markdown_table(["memory", "unit", "variant", "saved", "by design", "peak"], body)) if body else ""


def slope(line: Line | None) -> str:
    """Return the bytes per unit, after a tilde if the points are not on a straight line."""
    if line is None:
        return ""
    kib = line.slope / 2**10
    # Adding 0.0 removes the sign of a rounded zero.
    shown = f"{kib / 2**10:.2f} MiB" if abs(kib) >= 1000 else f"{round(kib, 2) + 0.0:.2f} KiB"
    return shown if line.straight else f"~{shown}"


def _per(curve: Curve) -> str:
    return f"per {UNITS.get(curve.letter, curve.letter)}"


def write_plots(curves: Sequence[Curve], machine: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a PNG file for each sweep of several points; return the paths."""
    drawn: dict[str, list[Curve]] = {}
    for curve in curves:
        if len(curve.cases) > 1:
            drawn.setdefault(f"memory-{curve.first.operator}-{curve.letter}", []).append(curve)
    # A letter has several curves if other sizes are swept too.
    paths = [
        (folder / (f"{name}-{place}.png" if len(alike) > 1 else f"{name}.png"), curve)
        for name, alike in drawn.items()
        for place, curve in enumerate(alike, start=1)
    ]
    return [path for place, curve in paths for path in plots.write(partial(draw, curve, machine), place)]


def draw(curve: Curve, machine: Mapping[str, Any]) -> Any:
    """Draw a panel for each measure, with the design as a dotted line; None if nothing was measured."""
    shown = [one for one in MEASURES if one.title and any(curve.points(v, one.of) for v in curve.variants)]
    if not shown:
        return None
    figure, panels = plots.figure(len(shown))
    for panel, measure in zip(panels, shown, strict=True):
        for place, name in enumerate(curve.variants):
            _line(panel, curve.points(name, measure.of), "o-", color=CYCLE[place % len(CYCLE)], label=name)
            if measure is SAVED:
                _line(panel, curve.points(name, expected), ":", color="black")
        panel.set(title=measure.title, ylabel="MiB", xlabel=AXES.get(curve.letter, curve.letter))
        panel.set(xlim=(0, None), ylim=(0, None))
    plots.legend_below(figure, panels[0])
    first = curve.first
    figure.suptitle(f"{first.operator} {first.dtype} {sizes_text(curve.fixed)}; {plots.device_name(machine)}")
    return figure


def _line(panel: Any, points: Sequence[tuple[int, int]], style: str, **options: str) -> None:
    panel.plot([x for x, _ in points], [y / 2**20 for _, y in points], style, **options)
