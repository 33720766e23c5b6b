"""A stream's run in pictures: steps, memory, quality and parts, as experts grow."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import pictures
from bench.measure import quantiles
from bench.stream.records import RunRecord, StreamRun
from bench.stream.tables import METRICS, medians, parted
from xsmoe.report.style import BLUE, CYCLE, GREEN, GREY, RED

COLOURS = (RED, BLUE, GREEN)


def write(run: StreamRun, folder: Path) -> list[Path]:
    """Writes each picture that the run allows as a PNG file, and returns where they are."""
    return [
        path for name, draw in PICTURES.items() for path in pictures.write(partial(draw, run), folder / f"{name}.png")
    ]


def draw_time(run: StreamRun) -> Any:
    """Each run's step with the 10th and 90th percentile on a logarithmic axis, and the ratios."""
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    figure, (steps, ratios) = pictures.figure(2)
    for name, colour in zip(run.names, COLOURS, strict=False):
        found = [(w.experts, quantiles(r.step_seconds)) for w in run.windows if (r := w.timed(name))]
        x = [experts for experts, _ in found]
        steps.plot(x, [1e3 * q.median for _, q in found], "o-", color=colour, label=name)
        low, high = [1e3 * q.p10 for _, q in found], [1e3 * q.p90 for _, q in found]
        steps.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        compared = [(w.experts, ratio) for w in run.windows if name != run.names[0] and (ratio := w.ratio(name))]
        if compared:
            x = [experts for experts, _ in compared]
            ratios.plot(x, [ratio[0] for _, ratio in compared], "o-", color=colour, label=name)
            low, high = [ratio[1] for _, ratio in compared], [ratio[2] for _, ratio in compared]
            ratios.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    steps.set(yscale="log", title="A training step", ylabel="milliseconds")
    steps.yaxis.set_major_formatter(ScalarFormatter())
    steps.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    ratios.set(title="Times faster than published", ylim=(0, None))
    ratios.axhline(1, color=GREY, linewidth=1)
    return _finished(run, figure, steps, ratios)


def draw_memory(run: StreamRun) -> Any:
    """Each run's peak in a step, and what it holds between steps."""
    figure, (peaks, held) = pictures.figure(2)
    _lines(run, peaks, lambda one: (one.peak_bytes or 0) / 2**20)
    _lines(run, held, lambda one: (one.weight_bytes + one.optimizer_bytes) / 2**20)
    peaks.set(title="Peak of a step beyond what is held", ylabel="MiB", ylim=(0, None))
    held.set(title="Weights and optimizer, held between steps", ylabel="MiB", ylim=(0, None))
    return _finished(run, figure, peaks, held)


def draw_quality(run: StreamRun) -> Any:
    """Each run's HR and NDCG on the next window, with standard errors."""
    tested = [window for window in run.windows if window.popularity is not None]
    if not tested:
        return None
    figure, panels = pictures.figure(2)
    for panel, metric in zip(panels, METRICS, strict=True):
        for place, (name, colour) in enumerate(zip(run.names, COLOURS, strict=False)):
            found = [(w.experts, r.test_scores) for w in tested if (r := w.timed(name)) and r.test_scores]
            panel.errorbar(
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
    return _finished(run, figure, *panels)


def draw_parts(run: StreamRun) -> Any:
    """Each run's parts of a step, stacked."""
    names = [name for name in run.names if all(parted(r) for w in run.windows if (r := w.timed(name)))]
    figure, panels = pictures.figure(len(names))
    for panel, name in zip(panels, names, strict=True):
        found = [(w.experts, medians(r)) for w in run.windows if (r := w.timed(name))]
        bottom = [0.0] * len(found)
        for place, part in enumerate(run.parts):
            height = [1e3 * spent[place] for _, spent in found]
            panel.bar([experts for experts, _ in found], height, bottom=bottom, color=CYCLE[place], label=part)
            bottom = [low + high for low, high in zip(bottom, height, strict=True)]
        panel.set(title=f"Parts of a step, {name}", ylabel="milliseconds")
    return _finished(run, figure, *panels)


PICTURES: dict[str, Callable[[StreamRun], Any]] = {
    "time": draw_time,
    "memory": draw_memory,
    "quality": draw_quality,
    "parts": draw_parts,
}


def _lines(run: StreamRun, panel: Any, value: Callable[[RunRecord], float]) -> None:
    for name, colour in zip(run.names, COLOURS, strict=False):
        found = [(window.experts, value(record)) for window in run.windows if (record := window.timed(name))]
        panel.plot([x for x, _ in found], [y for _, y in found], "o-", color=colour, label=name)


def _finished(run: StreamRun, figure: Any, *panels: Any) -> Any:
    from matplotlib.ticker import MaxNLocator

    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        panel.set_xlabel("experts a level")
    pictures.legend_below(figure, panels[0])
    s = run.settings
    figure.suptitle(f"{pictures.device(run.machine)}; {s['dtype']}, batch {s['batch']}, {s['pooling']} pooling")
    return figure
