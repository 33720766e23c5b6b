"""Plots of a run. They need no display and do not change matplotlib's global state."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xsmoe.atomic_files import replace_file
from xsmoe.extras import extra
from xsmoe.report.results import POPULARITY, WindowResult, expert_births
from xsmoe.report.style import BLUE, CYCLE, DPI, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE
from xsmoe.report.verdict import BASELINES
from xsmoe.stream.evaluation.window_evaluation import JUDGED, MODEL

Series = tuple[str, str, str, str, Sequence[Any]]
"""A label, a colour, a marker, a line style, and a summary for each test."""


@dataclass(frozen=True)
class Plot:
    """A plot: its file name, its caption, and the function that draws it (which returns None without data)."""

    name: str
    caption: str
    draw: Callable[[Sequence[WindowResult]], Any]


def write_plots(results: Sequence[WindowResult], folder: Path) -> list[tuple[Plot, Path]]:
    """Write all plots for which the results have data as PNG files, atomically, and remove the files of the others.

    Args:
        results: a run's windows.
        folder: the folder, which is created if it is missing.
    """
    with extra("train"):
        import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for plot in PLOTS:
            figure, path = plot.draw(results), folder / f"{plot.name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            picture = io.BytesIO()
            figure.savefig(picture, dpi=DPI, format="png")
            replace_file(path, picture.getvalue())
            written.append((plot, path))
    return written


def draw_quality(results: Sequence[WindowResult]) -> Any:
    """Plot HR@10 and NDCG@10 of model and popularity on each next window, and of the model on untrained targets.

    Error bars are standard errors.
    """
    tests = [result.test for result in results if result.test is not None]
    if not tests:
        return None
    figure, panels = _figure(2, width=10, height=4.2)
    series: list[Series] = [
        ("model", BLUE, "o", "-", [test["all"] for test in tests]),
        ("model, targets never trained on", SKY, "D", "--", [test["cold"] for test in tests]),
    ]
    for (name, title), colour, marker in zip(POPULARITY.items(), (ORANGE, RED), "s^", strict=True):
        series.append((title, colour, marker, "-", [test["popularity"][name] for test in tests]))
    for panel, metric in zip(panels, ("HR@10", "NDCG@10"), strict=True):
        _with_errors(panel, tests, series, metric)
        panel.set_title(f"{metric} on the next window")
    _legend_below(figure, panels[0])
    return figure


def draw_baselines(results: Sequence[WindowResult]) -> Any:
    """Plot HR@10 of the model and of every baseline on targets new to the user, by window, with both scorings."""
    tests = [result.test for result in results if result.test is not None and "groups" in result.test]
    if not tests:
        return None
    figure, panels = _figure(2, width=10, height=4.2)
    metric, group = JUDGED["metric"], JUDGED["group"]
    looks = zip((BLUE, ORANGE, RED, GREEN, PURPLE), "os^Dv", ("-", "-", "-", "-", "--"), strict=True)
    names = list(zip({MODEL: "model", **BASELINES}.items(), looks, strict=True))
    titles = {"masked": "earlier items of the window masked", "seen": "not masked"}
    for panel, (scoring, title) in zip(panels, titles.items(), strict=True):
        series = [
            (label, *look, [test["groups"][scoring][group][name] for test in tests]) for (name, label), look in names
        ]
        _with_errors(panel, tests, series, metric)
        panel.set_title(f"{metric}, items new to the user, {title}")
    _legend_below(figure, panels[0])
    return figure


def _with_errors(panel: Any, tests: Sequence[Any], series: Sequence[Series], metric: str) -> None:
    """Plot a metric of each series, which has one summary per test, with its standard errors."""
    for place, (label, colour, marker, line, summaries) in enumerate(series):
        known = [
            (test["tested_on"], found[metric], found["se"][metric] or 0.0)
            for test, found in zip(tests, summaries, strict=True)
            if found[metric] is not None
        ]
        if known:
            # Shift the series horizontally so that their error bars do not overlap.
            shift = 0.05 * (place - (len(series) - 1) / 2)
            panel.errorbar(
                [x + shift for x, _, _ in known],
                [100 * value for _, value, _ in known],
                [100 * error for _, _, error in known],
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=5,
                capsize=3,
                linewidth=1.6,
                label=label,
            )
    panel.set(xlabel="window tested on", ylabel=f"{metric} (%)")
    panel.set_ylim(bottom=0)
    _whole_ticks(panel)


def draw_experts(results: Sequence[WindowResult]) -> Any:
    """Plot the number of experts of each level of each modality."""
    done = [result for result in results if result.trained is not None]
    if not done:
        return None
    modalities = list(done[0].trained["experts"])  # type: ignore[index]
    figure, panels = _figure(len(modalities), width=10, height=3.6, share_y=True)
    for panel, modality in zip(panels, modalities, strict=True):
        counts = [result.trained["experts"][modality] for result in done if result.trained is not None]
        levels = len(counts[0])
        for level in range(levels):
            panel.bar(
                [result.number + 0.8 / levels * (level - (levels - 1) / 2) for result in done],
                [count[level] for count in counts],
                width=0.72 / levels,
                color=CYCLE[level % len(CYCLE)],
                label=f"side level {level + 1}",
            )
        panel.set(title=f"Experts, {modality}", xlabel="window")
        panel.grid(visible=False, axis="x")
        _whole_ticks(panel, both=True)
    panels[0].set_ylabel("experts")
    _legend_below(figure, panels[0])
    return figure


def draw_utilization(results: Sequence[WindowResult]) -> Any:
    """Plot each expert's share of its level's utilization. An expert keeps its colour until it is pruned."""
    births = expert_births(results)
    done = [result for result in results if result.trained is not None]
    if not births:
        return None
    import matplotlib

    levels = max(len(places) for places in births.values())
    figure, _ = _figure(0, width=10, height=2.9 * len(births) + 0.6)
    panels = figure.subplots(len(births), levels, squeeze=False, sharex=True, sharey=True)
    newest = max(max(alive) for places in births.values() for place in places for alive in place)
    colours = matplotlib.colormaps["cividis"].resampled(newest + 1)(range(newest + 1))
    for row, (modality, places) in zip(panels, births.items(), strict=True):
        for level, (panel, place) in enumerate(zip(row, places, strict=True)):
            for result, alive in zip(done, place, strict=True):
                shares = result.trained["shares"][modality][level] if result.trained is not None else []
                height = 0.0
                for birth, share in zip(alive, shares, strict=True):
                    panel.bar(
                        result.number, share or 0.0, bottom=height, width=0.8, color=colours[birth], edgecolor="white"
                    )
                    height += share or 0.0
            panel.set(title=f"{modality}, side level {level + 1}", ylim=(0, 1))
            panel.grid(visible=False)
            _whole_ticks(panel)
        row[0].set_ylabel("share of utilization")
    for panel in panels[-1]:
        panel.set_xlabel("window")
    patches = [matplotlib.patches.Patch(color=colours[birth], label=str(birth)) for birth in range(newest + 1)]
    figure.legend(
        handles=patches, title="expert added in window", loc="outside lower center", ncols=min(len(patches), 12)
    )
    return figure


def draw_cost(results: Sequence[WindowResult]) -> Any:
    """Plot the time of each window, the time of a training step by epoch, and peak memory."""
    done = [result for result in results if result.epochs]
    if not done:
        return None
    figure, panels = _figure(3, width=11, height=3.8)
    windows = [result.number for result in done]
    training = [sum(line["steps"] * line["time"]["step_ms"] for line in r.epochs) / 1000 for r in done]
    epochs = [sum(line["time"]["seconds"] for line in r.epochs) for r in done]
    testing = [r.test["time"]["seconds"] if r.test else 0.0 for r in done]
    validating = [max(0.0, whole - part) for whole, part in zip(epochs, training, strict=True)]
    bottom = [0.0] * len(done)
    for label, colour, values in (
        ("training", BLUE, training),
        ("validation", ORANGE, validating),
        ("test", GREEN, testing),
    ):
        panels[0].bar(windows, values, bottom=bottom, color=colour, label=label, width=0.8)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    panels[0].set(title="Time of a window", xlabel="window", ylabel="seconds")
    panels[0].grid(visible=False, axis="x")
    lines = [line for result in done for line in result.epochs]
    steps = [line["time"]["step_ms"] for line in lines]
    panels[1].plot(range(len(lines)), steps, ".-", color=BLUE, linewidth=1)
    panels[1].set(title="Time of a training step", xlabel="epoch, over all windows", ylabel="milliseconds")
    panels[1].set_ylim(0, 1.08 * max(steps))
    peaks = [max(line["time"]["peak_rss_mib"] for line in result.epochs) for result in done]
    panels[2].plot(windows, peaks, "o-", color=BLUE, label="process")
    cuda = [max(line["time"].get("cuda_peak_mib", 0.0) for line in result.epochs) for result in done]
    if any(cuda):
        panels[2].plot(windows, cuda, "s-", color=RED, label="GPU")
        panels[2].legend(loc="lower right")
    panels[2].set(title="Peak memory of the process" if not any(cuda) else "Peak memory", xlabel="window", ylabel="MiB")
    panels[2].set_ylim(0, 1.15 * max(peaks + cuda))
    for panel in (panels[0], panels[2]):
        _whole_ticks(panel)
    _legend_below(figure, panels[0], side="left")
    return figure


def draw_training(results: Sequence[WindowResult]) -> Any:
    """Plot training loss and validation NDCG@10 over the epochs of all windows."""
    done = [result for result in results if result.epochs]
    if not done:
        return None
    figure, panels = _figure(2, width=10, height=5.6, rows=True)
    start = 0
    for place, result in enumerate(done):
        epochs = [start + line["epoch"] for line in result.epochs]
        colour = CYCLE[place % 2]
        panels[0].plot(epochs, [line["loss"] for line in result.epochs], ".-", color=colour, linewidth=1.2)
        scored = [(x, line) for x, line in zip(epochs, result.epochs, strict=True) if line["validation"] is not None]
        values = [100 * line["validation"]["NDCG@10"] for _, line in scored]
        panels[1].plot([x for x, _ in scored], values, ".-", color=colour, linewidth=1.2)
        if (kept := _kept(result)) is not None:
            epoch, value = kept
            panels[1].plot([start + epoch], [100 * value], "*", color="black", markersize=9, zorder=5, clip_on=False)
        panels[0].annotate(
            str(result.number), (start, 1.0), xycoords=("data", "axes fraction"), va="bottom", fontsize=9, color=colour
        )
        start += result.epochs[-1]["epoch"] + 1
        for panel in panels[: 2 if place + 1 < len(done) else 0]:
            panel.axvline(start - 0.5, color=GREY, linewidth=0.8, linestyle=":")
    panels[0].set_title("Training loss (numbers: the window)", pad=18)
    panels[0].set_ylabel("loss (nats)")
    panels[1].set(
        title="Validation NDCG@10 (stars: the weights kept)", xlabel="epoch, over all windows", ylabel="NDCG@10 (%)"
    )
    panels[1].set_ylim(bottom=0)
    return figure


def _kept(result: WindowResult) -> tuple[int, float] | None:
    """Return the epoch whose weights were kept and its validation NDCG@10; None without validation.

    An average over epochs counts as the last epoch. A window in training returns its best epoch so far.
    """
    trained = result.trained
    if trained is None:
        scored = [line for line in result.epochs if line["best"]]
        return (scored[-1]["epoch"], scored[-1]["validation"]["NDCG@10"]) if scored else None
    if trained["validation"] is None:
        return None
    last = trained["best_epoch"] if trained["kept"] == "best" else result.epochs[-1]["epoch"]
    return last, trained["validation"]["NDCG@10"]


PLOTS = (
    Plot(
        "quality",
        "Each user's last target: the model of each window, tested on the window after it, against the most popular "
        "items of all windows so far and of the last one. Bars are standard errors over users.",
        draw_quality,
    ),
    Plot(
        "baselines",
        "Targets that are new to their user: the model and all baselines. Left: the user's earlier items of the tested "
        "window are masked; the verdict uses this scoring. Right: without the mask. Bars are standard errors clustered "
        "by user.",
        draw_baselines,
    ),
    Plot("experts", "Experts at each level. Each window adds one, and little-used ones are pruned.", draw_experts),
    Plot(
        "utilization",
        "Each expert's share of its level's utilization, in the kept epoch of each window.",
        draw_utilization,
    ),
    Plot("cost", "Time and memory.", draw_cost),
    Plot("training", "Loss and validation over the epochs of all windows.", draw_training),
)


def _figure(panels: int, *, width: float, height: float, rows: bool = False, share_y: bool = False) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if not panels:
        return figure, []
    if rows:
        return figure, list(figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0])
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=share_y)[0])


def _whole_ticks(panel: Any, *, both: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    if both:
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))


def _legend_below(figure: Any, panel: Any, side: str = "center") -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc=f"outside lower {side}", ncols=4)
