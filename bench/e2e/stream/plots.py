"""Plots of a stream: time, memory, quality and parts of a step as experts grow."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.core.timing import quantiles
from bench.e2e.stream.records import RunRecord, StreamRun, WindowRecord
from bench.e2e.stream.report import METRICS, part_medians
from bench.report import plots
from xsmoe.report.style import BLUE, CYCLE, GREEN, GREY, RED

COLOURS = (RED, BLUE, GREEN)


def write_plots(run: StreamRun, folder: Path) -> list[Path]:
    """Write a PNG file for each plot that the run has data for; return the paths."""
    drawn = {"time": _time, "memory": _memory, "quality": _quality, "parts": _parts}
    return [
        path for name, draw in drawn.items() for path in plots.write(partial(_draw, run, draw), folder / f"{name}.png")
    ]


def _draw(run: StreamRun, draw: Callable[[StreamRun], tuple[Any, list[Any]] | None]) -> Any:
    """Draw the panels, and their axes, legend and title; return None if the run has no data for them."""
    from matplotlib.ticker import MaxNLocator

    if (drawn := draw(run)) is None:
        return None
    figure, panels = drawn
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        panel.set_xlabel("experts per level")
    plots.legend_below(figure, panels[0])
    s = run.settings
    figure.suptitle(f"{plots.device_name(run.machine)}; {s['dtype']}, batch {s['batch']}, {s['pooling']} pooling")
    return figure


def _time(run: StreamRun) -> Any:
    """Draw each run's step with its 10th and 90th percentiles on a logarithmic axis, and the speed-ups."""
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    figure, (steps, speedups) = plots.figure(2)
    for name, colour, done in _runs(run):
        bands = [(steps, [[1e3 * seconds for seconds in quantiles(record.step_seconds)] for _, record in done])]
        if name != run.names[0]:
            bands.append((speedups, [list(ratio) for window, _ in done if (ratio := window.ratio(name))]))
        for panel, points in bands:
            if points:
                x, (median, low, high) = _experts(done), zip(*points, strict=True)
                panel.plot(x, median, "o-", color=colour, label=name)
                panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    steps.set(yscale="log", title="A training step", ylabel="milliseconds")
    steps.yaxis.set_major_formatter(ScalarFormatter())
    steps.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    speedups.set(title="Speed-up over the paper's formulation", ylim=(0, None))
    speedups.axhline(1, color=GREY, linewidth=1)
    return figure, [steps, speedups]


def _memory(run: StreamRun) -> Any:
    """Draw each run's peak in a step, and the memory that it holds between steps."""
    figure, (peaks, held) = plots.figure(2)
    for name, colour, done in _runs(run):
        peaks.plot(_experts(done), [(one.peak_bytes or 0) / 2**20 for _, one in done], "o-", color=colour, label=name)
        held.plot(_experts(done), [one.held_bytes / 2**20 for _, one in done], "o-", color=colour, label=name)
    peaks.set(title="Peak of a step beyond the memory between steps", ylabel="MiB", ylim=(0, None))
    held.set(title="Weights and optimizer, held between steps", ylabel="MiB", ylim=(0, None))
    return figure, [peaks, held]


def _quality(run: StreamRun) -> Any:
    """Draw each run's HR and NDCG on the next window, with standard errors."""
    popular = [(window.experts, window.popularity) for window in run.windows if window.popularity is not None]
    if not popular:
        return None
    figure, panels = plots.figure(2)
    for panel, metric in zip(panels, METRICS, strict=True):
        for place, (name, colour, done) in enumerate(_runs(run)):
            found = [(window.experts, scores) for window, one in done if (scores := one.test_scores)]
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
        x, y = zip(*((experts, 100 * scores[metric]) for experts, scores in popular), strict=True)
        panel.plot(x, y, "--", color=GREY, label="popularity")
        panel.set(title=f"{metric} on the next window", ylabel="%", ylim=(0, None))
    return figure, panels


def _parts(run: StreamRun) -> Any:
    """Draw each run's parts of a step as stacked bars."""
    shown = [(name, done) for name, _, done in _runs(run) if all(record.has_parts for _, record in done)]
    figure, panels = plots.figure(len(shown))
    for panel, (name, done) in zip(panels, shown, strict=True):
        bottom = [0.0] * len(done)
        for place, part in enumerate(run.parts):
            height = [1e3 * part_medians(record)[place] for _, record in done]
            panel.bar(_experts(done), height, bottom=bottom, color=CYCLE[place], label=part)
            bottom = [low + high for low, high in zip(bottom, height, strict=True)]
        panel.set(title=f"Parts of a step, {name}", ylabel="milliseconds")
    return figure, panels


def _runs(run: StreamRun) -> Iterator[tuple[str, str, list[tuple[WindowRecord, RunRecord]]]]:
    """Yield each run's name, its colour, and its timed windows."""
    for name, colour in zip(run.names, COLOURS, strict=False):
        yield name, colour, [(window, record) for window in run.windows if (record := window.timed(name))]


def _experts(done: list[tuple[WindowRecord, RunRecord]]) -> list[int]:
    return [window.experts for window, _ in done]
