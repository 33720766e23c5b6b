"""A case in a picture: each variant's time beside the main rival's, its share of the floor, and its memory."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import pictures, standing
from bench.results import Case, Row, Run, Timing, mib, ms
from xsmoe.report.style import BLUE, GREY, RED

LABEL_ROOM = 1.35
"""How much longer than the longest bar an axis is, for the numbers beside the bars."""


def write(run: Run, folder: Path) -> list[Path]:
    """Writes a PNG file for each case in which something was measured, and returns where they are."""
    return [
        path
        for case in run.cases
        for path in pictures.write(partial(draw, run, case), folder / f"{file_name(case)}.png")
    ]


def file_name(case: Case) -> str:
    """A case's name among files."""
    return "-".join([case.operator, case.dtype, *(f"{letter}{size}" for letter, size in case.sizes.items())])


def draw(run: Run, case: Case) -> Any:
    """A bar for each variant that was measured, in the table's order; None where none was."""
    found = [(row, timing) for row in case.rows if (timing := standing.whole(row)) is not None]
    if not found:
        return None
    rows, timings = [row for row, _ in found], [timing for _, timing in found]
    rival = main_rival(case, rows)
    figure, (times, floor, memory) = pictures.figure(3, width=4.6, height=1.9 + 0.34 * len(rows), sharey=True)
    colours = [BLUE if standing.ours(row) else RED if row is rival else GREY for row in rows]
    medians = [1e3 * timing.median for timing in timings]
    ends = [1e3 * timing.p90 for timing in timings]
    _bars(times, medians, [_time(row, timing, rival) for row, timing in found], colours, ends)
    spread = [[1e3 * (t.median - t.p10) for t in timings], [1e3 * (t.p90 - t.median) for t in timings]]
    times.errorbar(medians, range(len(rows)), xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    times.set_xlim(0, LABEL_ROOM * max(ends))
    times.set(title=f"{_pass(rows[0])}; x: times as fast as {rival.variant}", xlabel="milliseconds")
    times.set_yticks(
        range(len(rows)),
        [f"{standing.marked(row)} ({row.backend})" if row.backend else standing.marked(row) for row in rows],
    )
    times.invert_yaxis()
    shares = [100 * timing.share for timing in timings]
    _bars(floor, shares, [f"{share:.0f} %" if share >= 10 else f"{share:.1f} %" for share in shares], colours)
    floor.axvline(100, color="black", linewidth=1, linestyle="--")
    floor.set_xlim(0, max(118, LABEL_ROOM * max(shares)))
    floor.set(title="Of the floor (100 %: the limit)", xlabel="%")
    title, sizes = _memory(rows)
    said = [mib(size) or "not counted" for size in sizes]
    heights = [(size or 0) / 2**20 for size in sizes]
    _bars(memory, heights, said, colours)
    memory.set_xlim(0, LABEL_ROOM * max(heights) or 1)
    memory.set(title=title, xlabel="MiB")
    for panel in (times, floor, memory):
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)
    letters = ", ".join(f"{letter} {size}" for letter, size in case.sizes.items())
    figure.suptitle(f"{case.operator} {case.dtype}, {letters}\n{pictures.device(run.machine)}", fontsize="medium")
    if marks := standing.explained(rows):
        figure.supxlabel("\n".join(marks), fontsize="small")
    return figure


def main_rival(case: Case, rows: Sequence[Row]) -> Row:
    """The first baseline of a case; the first row where nothing is compared."""
    names = [name for row in rows for timing in row.passes.values() for name in timing.against]
    return next((row for name in names for row in rows if row.variant == name), rows[0])


def _memory(rows: Sequence[Row]) -> tuple[str, list[int | None]]:
    """The peaks of steps; where nobody counted them, as in older files, what is kept for backward."""
    peaks = [row.peak_bytes for row in rows]
    if any(peak is not None for peak in peaks):
        return "Peak memory of a step", peaks
    return "Kept for backward", [row.saved_bytes for row in rows]


def _time(row: Row, timing: Timing, rival: Row) -> str:
    alike = row is not rival and standing.problem(row) == standing.problem(rival)
    ratio = standing.ratio(row, rival, standing.step(row)) if alike else None
    said = ms(timing.median)
    return said if ratio is None else f"{said}  (x {ratio.median:.2f})"


def _pass(row: Row) -> str:
    if "both" not in row.passes:
        return "Forward"
    return "Forward and backward" if len(row.passes) > 1 else "A whole step"


def _bars(
    panel: Any, values: Sequence[float], said: Sequence[str], colours: Sequence[str], ends: Sequence[float] = ()
) -> None:
    """Bars with what they say behind their ends, or behind `ends`."""
    panel.barh(range(len(values)), values, color=colours, height=0.65)
    for place, (end, text) in enumerate(zip(ends or values, said, strict=True)):
        # On white, so that no line crosses a number.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        panel.annotate(text, (end, place), **where, fontsize="small", bbox=box)
