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
    """A number of bytes of a row.

    Attributes:
        name: used in tables.
        of: returns the bytes of a row; None if they were not measured.
        title: of its panel; empty if it is not drawn.
    """

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
        label = name
        for measure in MEASURES:
            cells = [_cell(row, measure) for row in curve.rows(name)]
            points = curve.points(name, measure.of)
            if not points and (measure is not SAVED or not any(cells)):
                continue
            designed = fit(curve.points(name, expected)) if measure is SAVED else None
            body.append([label, measure.name, *cells, slope(fit(points)), slope(designed)])
            label = ""
        notes += _notes(curve, name)
    fixed = ", ".join(f"{letter} {size}" for letter, size in curve.fixed.items())
    over = f" over {curve.letter}" if len(curve.cases) > 1 else ""
    title = f"### memory of {curve.first.operator} {curve.first.dtype}{over}, {fixed}"
    return "\n".join([title, "", *markdown_table(head, body), "", *notes])


def slope_table(sweeps: Sequence[Curve]) -> str:
    """Return a row for each sweep and variant: the slopes of its saved activations and its peak."""
    body = []
    for curve in sweeps:
        if len(curve.cases) < 2:
            continue
        label = f"{curve.first.operator} {curve.first.dtype} {sizes_text(curve.fixed)}"
        for name in curve.variants:
            saved, peak = (slope(fit(curve.points(name, one.of))) for one in (SAVED, PEAK))
            if saved or peak:
                body.append([label, _per(curve), name, saved, slope(fit(curve.points(name, expected))), peak])
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


def _cell(row: Row | None, measure: Measure) -> str:
    if row is None:
        return ""
    if row.status != "measured":
        return row.status if measure is SAVED else ""
    return mib(measure.of(row))


def _notes(curve: Curve, name: str) -> list[str]:
    rows = [(size, row) for size, row in zip(curve.values, curve.rows(name), strict=True) if row is not None]
    errors = [row.error for _, row in rows if row.status == "measured" and row.error is not None]
    notes = [f"- {name}: largest error {max(errors):.2f} of the reference's"] if errors else []
    places: dict[str, list[str]] = {}
    for size, row in rows:
        for text in (f"{row.status}: {row.reason}" if row.reason else None, row.remark):
            if text:
                places.setdefault(text, []).append(f"{curve.letter} {size}")
    return notes + [f"- {name} at {', '.join(where)} {text}" for text, where in places.items()]


def write_plots(curves: Sequence[Curve], machine: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a PNG file for each sweep of several points; return the paths."""
    drawn = [curve for curve in curves if len(curve.cases) > 1]
    names = [f"memory-{curve.first.operator}-{curve.letter}" for curve in drawn]
    # A letter has several curves if other sizes are swept too.
    unique = [f"{name}-{names[:place].count(name) + 1}" if names.count(name) > 1 else name
              for place, name in enumerate(names)]  # fmt: skip
    return [
        path
        for name, curve in zip(unique, drawn, strict=True)
        for path in plots.write(partial(draw, curve, machine), folder / f"{name}.png")
    ]


def draw(curve: Curve, machine: Mapping[str, Any]) -> Any:
    """Draw a panel for each measure, with the design as a dotted line; None if nothing was measured."""
    shown = [one for one in MEASURES if one.title and any(curve.points(v, one.of) for v in curve.variants)]
    if not shown:
        return None
    figure, panels = plots.figure(len(shown))
    for panel, measure in zip(panels, shown, strict=True):
        for place, name in enumerate(curve.variants):
            colour = CYCLE[place % len(CYCLE)]
            points = curve.points(name, measure.of)
            panel.plot([x for x, _ in points], [y / 2**20 for _, y in points], "o-", color=colour, label=name)
            if measure is SAVED and (designed := curve.points(name, expected)):
                panel.plot([x for x, _ in designed], [y / 2**20 for _, y in designed], ":", color="black")
        panel.set(title=measure.title, ylabel="MiB", xlabel=AXES.get(curve.letter, curve.letter))
        panel.set(xlim=(0, None), ylim=(0, None))
    plots.legend_below(figure, panels[0])
    first = curve.first
    figure.suptitle(f"{first.operator} {first.dtype} {sizes_text(curve.fixed)}; {plots.device_name(machine)}")
    return figure
