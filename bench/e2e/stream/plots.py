"""Plots of a stream: time, memory, quality and parts of a step as experts grow."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.core.timing import quantiles
from bench.e2e.stream.records import RunRecord, StreamRun
from bench.e2e.stream.report import METRICS, part_medians
from bench.report import plots
from xsmoe.report.style import BLUE, CYCLE, GREEN, GREY, RED

COLOURS = (RED, BLUE, GREEN)


def write_plots(run: StreamRun, folder: Path) -> list[Path]:
    """Write a PNG file for each plot that the run has data for; return the paths."""
    drawn = {"time": draw_time, "memory": draw_memory, "quality": draw_quality, "parts": draw_parts}
    return [path for name, draw in drawn.items() for path in plots.write(partial(draw, run), folder / f"{name}.png")]


def draw_time(run: StreamRun) -> Any:
    """Draw each run's step with its 10th and 90th percentiles on a logarithmic axis, and the speed-ups."""
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    figure, (steps, speedups) = plots.figure(2)
    for name, colour in zip(run.names, COLOURS, strict=False):
        timed = [(w.experts, quantiles(r.step_seconds)) for w in run.windows if (r := w.timed(name))]
        _band(steps, [(x, *(1e3 * seconds for seconds in q)) for x, q in timed], colour, name)
        if name != run.names[0]:
            ratios = [(w.experts, *ratio) for w in run.windows if (ratio := w.ratio(name))]
            _band(speedups, ratios, colour, name)
    steps.set(yscale="log", title="A training step", ylabel="milliseconds")
    steps.yaxis.set_major_formatter(ScalarFormatter())
    steps.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    speedups.set(title="Speed-up over the paper's formulation", ylim=(0, None))
    speedups.axhline(1, color=GREY, linewidth=1)
    return _finish(run, figure, steps, speedups)


def draw_memory(run: StreamRun) -> Any:
    """Draw each run's peak in a step, and the memory that it holds between steps."""
    figure, (peaks, held) = plots.figure(2)
    _lines(run, peaks, lambda one: (one.peak_bytes or 0) / 2**20)
    _lines(run, held, lambda one: one.held_bytes / 2**20)
    peaks.set(title="Peak of a step beyond the memory between steps", ylabel="MiB", ylim=(0, None))
    held.set(title="Weights and optimizer, held between steps", ylabel="MiB", ylim=(0, None))
    return _finish(run, figure, peaks, held)


def draw_quality(run: StreamRun) -> Any:
    """Draw each run's HR and NDCG on the next window, with standard errors."""
    tested = [window for window in run.windows if window.popularity is not None]
    if not tested:
        return None
    figure, panels = plots.figure(2)
    for panel, metric in zip(panels, METRICS, strict=True):
        for place, (name, colour) in enumerate(zip(run.names, COLOURS, strict=False)):
            found = [(w.experts, r.test_scores) for w in tested if (r := w.timed(name)) and r.test_scores]
            panel.errorbar(
                # The runs are next to each other, so that their error bars do not overlap.
                [experts + 0.08 * (place - 0.5) for experts, _ in found],
                [100 * scores[metric] for _, scores in found],
                [100 * (scores["se"][metric] or 0.0) for _, scores in found],
                color=colour,
                marker="o",
                markersize=4,
                capsize=3,
                label=name,
            )
        popular = [100 * (window.popularity or {})[metric] for window in tested]
        panel.plot([window.experts for window in tested], popular, "--", color=GREY, label="popularity")
        panel.set(title=f"{metric} on the next window", ylabel="%", ylim=(0, None))
    return _finish(run, figure, *panels)


def draw_parts(run: StreamRun) -> Any:
    """Draw each run's parts of a step as stacked bars."""
    names = [name for name in run.names if all(r.has_parts for w in run.windows if (r := w.timed(name)))]
    figure, panels = plots.figure(len(names))
    for panel, name in zip(panels, names, strict=True):
        found = [(w.experts, part_medians(r)) for w in run.windows if (r := w.timed(name))]
        bottom = [0.0] * len(found)
        for place, part in enumerate(run.parts):
            height = [1e3 * seconds[place] for _, seconds in found]
            panel.bar([experts for experts, _ in found], height, bottom=bottom, color=CYCLE[place], label=part)
            bottom = [low + high for low, high in zip(bottom, height, strict=True)]
        panel.set(title=f"Parts of a step, {name}", ylabel="milliseconds")
    return _finish(run, figure, *panels)


def _band(panel: Any, points: Sequence[tuple[float, ...]], colour: str, label: str) -> None:
    """Draw (x, median, p10, p90) as a line in a band."""
    if points:
        x, median, low, high = zip(*points, strict=True)
        panel.plot(x, median, "o-", color=colour, label=label)
        panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _lines(run: StreamRun, panel: Any, value: Callable[[RunRecord], float]) -> None:
    for name, colour in zip(run.names, COLOURS, strict=False):
        found = [(window.experts, value(record)) for window in run.windows if (record := window.timed(name))]
        panel.plot([x for x, _ in found], [y for _, y in found], "o-", color=colour, label=name)


def _finish(run: StreamRun, figure: Any, *panels: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        panel.set_xlabel("experts per level")
    plots.legend_below(figure, panels[0])
    s = run.settings
    figure.suptitle(f"{plots.device_name(run.machine)}; {s['dtype']}, batch {s['batch']}, {s['pooling']} pooling")
    return figure
