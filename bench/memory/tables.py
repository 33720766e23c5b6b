"""Sweeps as tables in Markdown: bytes at each size, and how fast they grow."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.memory.growth import Curve, Line, fit
from bench.results import Row, aligned, lettered

ONE = {"N": "a row", "E": "an expert", "R": "a unit of rank", "B": "a user", "M": "a modality", "D": "a unit of width"}
"""What one more of a letter is."""


class Measure(NamedTuple):
    """A number of bytes that rows have: its name, and how it is read."""

    name: str
    of: Callable[[Row], int | None]


def beyond_results(row: Row) -> int | None:
    """The peak less what the step returned."""
    if row.peak_bytes is None or not row.returned_bytes:
        return None
    return max(0, row.peak_bytes - row.returned_bytes)


SAVED = Measure("saved", lambda row: row.saved_bytes)
MEASURES = (
    SAVED,
    Measure("peak", lambda row: row.peak_bytes),
    Measure("peak less results", beyond_results),
    Measure("resident", lambda row: row.resident_bytes),
)


def expected(row: Row) -> int | None:
    """What a variant's design says it saves."""
    return row.expected_saved_bytes


def table(curve: Curve) -> str:
    """A sweep: for each variant and measure the MiB at each size, the slope, and what the design says it is."""
    one = ONE.get(curve.letter, f"one {curve.letter}")
    head = ["variant", "MiB", *(f"{curve.letter} {value}" for value in curve.values), one, "by design"]
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
    return "\n".join([title, "", *aligned(head, body), "", *notes])


def slope(line: Line | None) -> str:
    """Bytes for one more, with a tilde if the points lie on no line."""
    if line is None:
        return ""
    kib = line.slope / 2**10
    # What is left of nothing by rounding has no sign.
    shown = f"{kib / 2**10:.2f} MiB" if abs(kib) >= 1000 else f"{round(kib, 2) + 0.0:.2f} KiB"
    return shown if line.straight else f"~{shown}"


def slopes(sweeps: Sequence[Curve]) -> str:
    """A row for each sweep and variant: how fast what it saves and its peak grow."""
    body = []
    for curve in sweeps:
        if len(curve.cases) < 2:
            continue
        fixed = lettered(curve.fixed)
        for name in curve.variants:
            found = [slope(fit(curve.points(name, one.of))) for one in MEASURES[:2]]
            if any(found):
                designed = slope(fit(curve.points(name, expected)))
                label = f"{curve.first.operator} {curve.first.dtype} {fixed}"
                body.append([label, ONE.get(curve.letter, f"one {curve.letter}"), name, found[0], designed, found[1]])
    return "\n".join(aligned(["memory", "for", "variant", "saved", "by design", "peak"], body)) if body else ""


def _cell(row: Row | None, measure: Measure) -> str:
    if row is None:
        return ""
    if row.status != "measured":
        return row.status if measure is SAVED else ""
    held = measure.of(row)
    return "" if held is None else f"{held / 2**20:.1f}"


def _notes(curve: Curve, name: str) -> list[str]:
    rows = [(size, row) for size, row in zip(curve.values, curve.rows(name), strict=True) if row is not None]
    errors = [row.error for _, row in rows if row.status == "measured" and row.error is not None]
    notes = [f"- {name}: largest error {max(errors):.2f} of the reference's"] if errors else []
    said: dict[str, list[str]] = {}
    for size, row in rows:
        for text in (f"{row.status}: {row.reason}" if row.reason else None, row.remark):
            if text:
                said.setdefault(text, []).append(f"{curve.letter} {size}")
    return notes + [f"- {name} at {', '.join(where)} {text}" for text, where in said.items()]
