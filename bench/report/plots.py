"""Plots of results (matplotlib)."""

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.core.results import Case, Role, Row, Run
from bench.report.comparison import problem_notes, speedup
from bench.report.roofline import Ceilings, Point
from bench.report.tables import mib, ms
from xsmoe.atomic_files import replace_file
from xsmoe.report.style import BLUE, DPI, GREEN, GREY, ORANGE, RED, STYLE

LABEL_SPACE = 1.35
"""The length of an axis relative to the longest bar, with space for the numbers behind the bars."""
_COLOURS = {Role.OURS: BLUE, Role.PAPER: RED, Role.EAGER: GREY, Role.COMPILED: GREEN, Role.LIBRARY: ORANGE}
_MARKERS = "osD^vPX*<>"
_LINES = ("-", "--", ":", "-.")


def has_matplotlib() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_and_print(write_all: Callable[[], list[Path]]) -> None:
    """Draw, and print the paths of the plots or why there are none."""
    if has_matplotlib():
        print(f"\nplots: {', '.join(map(str, write_all()))}", flush=True)
    else:
        print("\n--plot: no plots, because matplotlib is not installed (pip install matplotlib)", flush=True)


def write(draw: Callable[[], Any], path: Path) -> list[Path]:
    """Draw a figure into a PNG file, which is replaced atomically; write nothing if there is no figure."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        drawn = draw()
        if drawn is None:
            return []
        png = io.BytesIO()
        drawn.savefig(png, dpi=DPI, format="png")
    replace_file(path, png.getvalue())
    return [path]


def figure(
    panels: int, *, rows: int = 1, width: float = 5.0, height: float = 4.2, **options: Any
) -> tuple[Any, list[Any]]:
    """Return a figure that needs no display, and its panels, which are arranged in `rows` rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = -(-panels // rows)
    found = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(found)
    grid = list(found.subplots(rows, columns, squeeze=False, **options).flat)
    for unused in grid[panels:]:
        unused.remove()
    return found, grid[:panels]


def legend_below(found: Any, panel: Any) -> None:
    """Add one legend for all panels."""
    handles, labels = panel.get_legend_handles_labels()
    found.legend(handles, labels, loc="outside lower center", ncols=6)


def device_name(facts: Mapping[str, Any]) -> str:
    """Return the device and the number of threads, for a title."""
    name = facts["gpu"]["name"] if "gpu" in facts else facts["cpu"]["model"]
    return f"{name}, threads: {facts['threads']}"


def write_cases(run: Run, folder: Path) -> list[Path]:
    """Write a PNG file for each case with times; return the paths."""
    paths = []
    for one in run.cases:
        sizes = (f"{letter}{size}" for letter, size in one.sizes.items())
        path = folder / f"{'-'.join([one.operator, one.dtype, *sizes])}.png"
        paths += write(partial(case, run, one), path)
    return paths


def case(run: Run, case: Case) -> Any:
    """Draw times, shares of the bound and memory: a bar for each variant; None if no variant has times."""
    rows = [row for row in case.rows if row.step is not None]
    timings = [row.step for row in rows if row.step is not None]
    if not rows:
        return None
    baseline = main_baseline(rows)
    drawn, (times, of_bound, memory) = figure(3, width=4.6, height=1.9 + 0.34 * len(rows), sharey=True)
    colours = [BLUE if row.ours else RED if row is baseline else GREY for row in rows]
    medians, ends = [1e3 * t.median for t in timings], [1e3 * t.p90 for t in timings]
    _bars(times, medians, [_time(row, baseline) for row in rows], colours, ends)
    spread = [[1e3 * (t.median - t.p10) for t in timings], [1e3 * (t.p90 - t.median) for t in timings]]
    times.errorbar(medians, range(len(rows)), xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    times.set_xlim(0, LABEL_SPACE * max(ends))
    step = "Forward" if "both" not in rows[0].passes else "A whole step"
    if len(rows[0].passes) > 1:
        step = "Forward and backward"
    times.set(title=f"{step}; x: times as fast as {baseline.variant}", xlabel="milliseconds")
    times.set_yticks(range(len(rows)), [f"{r.label} ({r.backend})" if r.backend else r.label for r in rows])
    times.invert_yaxis()
    shares = [100 * timing.of_bound for timing in timings]
    _bars(of_bound, shares, [f"{share:.0f} %" if share >= 10 else f"{share:.1f} %" for share in shares], colours)
    of_bound.axvline(100, color="black", linewidth=1, linestyle="--")
    of_bound.set_xlim(0, max(118, LABEL_SPACE * max(shares)))
    of_bound.set(title="Of the speed-of-light bound", xlabel="%")
    title, sizes = "Peak memory of a step", [row.peak_bytes for row in rows]
    if all(size is None for size in sizes):
        # As in older files.
        title, sizes = "Saved activations", [row.saved_bytes for row in rows]
    heights = [(size or 0) / 2**20 for size in sizes]
    _bars(memory, heights, [mib(size) or "not measured" for size in sizes], colours)
    memory.set_xlim(0, LABEL_SPACE * max(heights) or 1)
    memory.set(title=title, xlabel="MiB")
    for panel in (times, of_bound, memory):
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)
    letters = ", ".join(f"{letter} {size}" for letter, size in case.sizes.items())
    drawn.suptitle(f"{case.operator} {case.dtype}, {letters}\n{device_name(run.machine)}", fontsize="medium")
    if notes := problem_notes(rows):
        drawn.supxlabel("\n".join(notes), fontsize="small")
    return drawn


def main_baseline(rows: Sequence[Row]) -> Row:
    """Return the first baseline of a case; the first row if nothing is compared."""
    names = [name for row in rows for timing in row.passes.values() for name in timing.against]
    return next((row for name in names for row in rows if row.variant == name), rows[0])


def roofline(points: Sequence[Point], ceilings: Mapping[str, Ceilings], title: str) -> Any:
    """Draw with logarithmic axes: a colour for each role, a marker for each operator, a roof for each dtype."""
    drawn, (axes,) = figure(1, width=9.0, height=6.0)
    points = [point for point in points if point.by_flop]
    reach = [*(point.intensity for point in points), *(roof.ridge for roof in ceilings.values())]
    left, right = min(reach) / 3, max(reach) * 3
    for (name, roof), line in zip(ceilings.items(), _LINES, strict=False):
        x = [left, roof.ridge, right]
        label = f"{name}: {_si(roof.flop)}FLOP/s, {_si(roof.bytes)}B/s, ridge {roof.ridge:.1f}"
        axes.plot(x, [roof.at(one) for one in x], color="black", linestyle=line, label=label)
    operators = list(dict.fromkeys(point.case.operator for point in points))
    for point in points:
        marker = _MARKERS[operators.index(point.case.operator) % len(_MARKERS)]
        axes.plot(point.intensity, point.rate, marker, color=_COLOURS[point.role], markersize=7, alpha=0.8, mew=0)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the least work", ylabel="FLOP/s")
    for role in [role for role in _COLOURS if any(point.role == role for point in points)]:
        axes.plot([], [], "s", color=_COLOURS[role], label=str(role))
    for place, operator in enumerate(operators):
        axes.plot([], [], _MARKERS[place % len(_MARKERS)], color="black", label=operator)
    drawn.legend(loc="outside lower center", ncols=3, fontsize="small")
    drawn.suptitle(title, fontsize="medium")
    return drawn


def _time(row: Row, baseline: Row) -> str:
    assert row.step is not None
    comparable = row is not baseline and row.problem == baseline.problem
    ratio = speedup(row, baseline, row.step_pass) if comparable else None
    return ms(row.step.median) + (f"  (x {ratio.median:.2f})" if ratio else "")


def _bars(
    panel: Any, values: Sequence[float], texts: Sequence[str], colours: Sequence[str], ends: Sequence[float] = ()
) -> None:
    """Draw bars with a text behind their ends, or behind `ends`."""
    panel.barh(range(len(values)), values, color=colours, height=0.65)
    for place, (end, text) in enumerate(zip(ends or values, texts, strict=True)):
        # On white, so that no line crosses a number.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        panel.annotate(text, (end, place), **where, fontsize="small", bbox=box)


def _si(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} "
