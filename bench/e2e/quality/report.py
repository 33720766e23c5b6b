"""Tables and plots of a comparison of variants."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.e2e.quality.variants import BASE
from bench.report import plots
from bench.report.tables import markdown_table
from xsmoe.report.style import BLUE, CYCLE, GREY

Found = Mapping[str, Any]

MATRIX_COLUMNS = {
    "own": "own",
    "next": "next",
    "backward": "later minus own",
    "last": "last minus own",
    "forward": "after next",
}
MAPS_PER_ROW = 5


def tables(found: Mapping[str, Found]) -> str:
    """Return all tables in Markdown.

    Args:
        found: from `summarize`, by variant.
    """
    parts = [_main_table(found)]
    groups = {(scoring, group): None for one in found.values() for scoring, of in one["groups"].items() for group in of}
    if groups:
        text = "HR@10 % of all targets, by group of targets and by the items that are no candidates:"
        head = ["variant", *(f"{group}, {scoring}" for scoring, group in groups)]
        rows = [
            [name, *(_percent(one["groups"].get(scoring, {}).get(group)) for scoring, group in groups)]
            for name, one in found.items()
        ]
        parts.append(_table(text, head, rows))
    if any(one["matrix"] for one in found.values()):
        text = (
            "HR@10 % of every window's model on every window, as means over windows. own: the model on its window. "
            "next: on the next window. later minus own: later models on a window minus its own model; a negative value "
            "means forgetting. last minus own: the same of the last model only. after next: on the windows after that."
        )
        signs = {kind: "+" if "minus" in title else "" for kind, title in MATRIX_COLUMNS.items()}
        rows = [
            [name, *(_percent(one["matrix"]["HR@10"][kind], sign) for kind, sign in signs.items())]
            for name, one in found.items()
            if one["matrix"]
        ]
        parts.append(_table(text, ["variant", *MATRIX_COLUMNS.values()], rows))
    commits = sorted({commit for one in found.values() for commit in one["commits"]})
    if len(commits) > 1:
        parts.append(f"**These runs are of several commits: {', '.join(commits)}.**")
    return "\n\n".join(parts)


def _main_table(found: Mapping[str, Found]) -> str:
    metrics = ("HR@10", "NDCG@10")
    head = ["variant", "seeds", *(cell for m in metrics for cell in (f"{m} %", f"minus {BASE}", "± users"))]
    head += ["experts", "seconds", "MiB", "verdicts"]
    rows = []
    for name, one in found.items():
        cells = [name, str(len(one["seeds"]))]
        for metric in metrics:
            difference = (one["difference"] or {}).get(metric)
            error = difference and difference["se_users"]
            cells += [_percent(one[metric]), _percent(difference, "+"), _number(error and 100 * error, 2)]
        cells += [_number(one["experts"], 1), _number(one["train_seconds"], 0), _number(one["peak_rss_mib"], 0)]
        cells.append(", ".join(f"{count} {verdict}" for verdict, count in one["verdicts"].items()))
        rows.append(cells)
    text = (
        "Ranks of each user's last item; items of earlier windows are no candidates. Mean ± standard error over seeds; "
        'differences are paired by seed. "± users" is the standard error of the paired difference over users.'
    )
    return _table(text, head, rows)


def _table(text: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([text, "", *markdown_table(head, rows)])


def _percent(value: Found | None, sign: str = "") -> str:
    if value is None or value["mean"] is None:
        return ""
    error = "" if value["se"] is None else f" ± {100 * value['se']:.2f}"
    return f"{100 * value['mean']:{sign}.2f}{error}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write_plots(found: Mapping[str, Found], title: str, path: Path) -> list[Path]:
    """Draw the comparison into a PNG file, and matrices, if there are any, into a second one next to it."""
    written = plots.write(partial(draw, found, title), path)
    matrix_path = path.with_name(f"{path.stem}-matrix{path.suffix}")
    return written + plots.write(partial(draw_matrices, found, title), matrix_path)


def draw(found: Mapping[str, Found], title: str) -> Any:
    """Draw HR@10 of every variant, its paired difference to the base, and HR@10 of each window."""
    from matplotlib.ticker import MaxNLocator

    figure, (rates, differences, windows) = plots.figure(3, height=max(4.2, 0.4 * len(found) + 1.6))
    values = [(one["HR@10"], (one["difference"] or {}).get("HR@10")) for one in found.values()]
    for panel, of_panel, marker in zip((rates, differences), zip(*values, strict=True), "os", strict=True):
        known = [(row, value) for row, value in enumerate(of_panel) if value is not None and value["mean"] is not None]
        panel.errorbar(
            [100 * value["mean"] for _, value in known],
            [row for row, _ in known],
            xerr=[100 * (value["se"] or 0.0) for _, value in known],
            fmt=marker,
            color=BLUE,
            capsize=3,
        )
        panel.set_yticks(range(len(found)), found)
        panel.set_ylim(len(found) - 0.5, -0.5)
        panel.set_xlabel("%")
    rates.set_title("HR@10, mean ± standard error over seeds")
    differences.set_title(f"Difference to {BASE}, paired by seed")
    differences.axvline(0, color=GREY, linewidth=1)
    for number, (name, one) in enumerate(found.items()):
        style, colour = ("-", "--", ":")[number // len(CYCLE) % 3], CYCLE[number % len(CYCLE)]
        means = [100 * value["mean"] if value["mean"] is not None else np.nan for value in one["windows"].values()]
        windows.plot([int(window) for window in one["windows"]], means, style, marker=".", color=colour, label=name)
    windows.set(title="HR@10 by tested window, mean over seeds", xlabel="window", ylabel="%", ylim=(0, None))
    windows.xaxis.set_major_locator(MaxNLocator(integer=True))
    windows.legend(fontsize=7)
    figure.suptitle(title)
    return figure


def draw_matrices(found: Mapping[str, Found], title: str) -> Any:
    """Draw HR@10 of every window's model on every window as heat maps with one scale; None without a matrix."""
    from matplotlib.ticker import MaxNLocator

    matrices = {name: np.array(one["matrix"]["HR@10"]["mean"], float) for name, one in found.items() if one["matrix"]}
    if not matrices:
        return None
    figure, panels = plots.figure(len(matrices), rows=-(-len(matrices) // MAPS_PER_ROW), width=3.6, height=3.6)
    highest = 100 * max(np.nanmax(values) for values in matrices.values())
    image = None
    for panel, (name, values) in zip(panels, matrices.items(), strict=True):
        image = panel.imshow(100 * values, vmin=0, vmax=highest, cmap="viridis")
        panel.set(title=name, xlabel="tested window", ylabel="model after window")
        panel.grid(False)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=panels, label="HR@10, %")
    figure.suptitle(title)
    return figure
