"""Tables and plots of a comparison of variants."""

from collections.abc import Mapping
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
    if any(one["groups"] for one in found.values()):
        parts.append(_group_table(found))
    if any(one["matrix"] for one in found.values()):
        parts.append(_matrix_table(found))
    commits = sorted({commit for one in found.values() for commit in one["commits"]})
    if len(commits) > 1:
        parts.append(f"**These runs are of several commits: {', '.join(commits)}.**")
    return "\n\n".join(parts)


def _main_table(found: Mapping[str, Found]) -> str:
    head = ["variant", "seeds", "HR@10 %", f"minus {BASE}", "± users", "NDCG@10 %", f"minus {BASE}", "± users"]
    head += ["experts", "seconds", "MiB", "verdicts"]
    rows = []
    for name, one in found.items():
        difference = one["difference"] or {}
        cells = [name, str(len(one["seeds"]))]
        for metric in ("HR@10", "NDCG@10"):
            cells.append(_percent(one[metric]))
            cells.append(_percent(difference.get(metric), "+"))
            cells.append(_number(difference.get(metric, {}).get("se_users"), 100, 2))
        cells += [_number(one[name], 1, digits) for name, digits in
                  (("experts", 1), ("train_seconds", 0), ("peak_rss_mib", 0))]  # fmt: skip
        cells.append(", ".join(f"{count} {verdict}" for verdict, count in one["verdicts"].items()))
        rows.append(cells)
    text = (
        "Ranks of each user's last item; items of earlier windows are no candidates. Mean ± standard error over seeds; "
        'differences are paired by seed. "± users" is the standard error of the paired difference over users.'
    )
    return "\n".join([text, "", *markdown_table(head, rows)])


def _group_table(found: Mapping[str, Found]) -> str:
    columns = dict.fromkeys(
        (scoring, group) for one in found.values() for scoring, groups in one["groups"].items() for group in groups
    )
    head = ["variant", *(f"{group}, {scoring}" for scoring, group in columns)]
    rows = [
        [name, *(_percent(one["groups"].get(scoring, {}).get(group)) for scoring, group in columns)]
        for name, one in found.items()
    ]
    text = "HR@10 % of all targets, by group of targets and by the items that are no candidates:"
    return "\n".join([text, "", *markdown_table(head, rows)])


def _matrix_table(found: Mapping[str, Found]) -> str:
    rows = [
        [name, *(_percent(one["matrix"]["HR@10"][kind], "+" if "minus" in title else "")
                 for kind, title in MATRIX_COLUMNS.items())]
        for name, one in found.items()
        if one["matrix"]
    ]  # fmt: skip
    text = (
        "HR@10 % of every window's model on every window, as means over windows. own: the model on its window. "
        "next: on the next window. later minus own: later models on a window minus its own model; a negative value "
        "means forgetting. last minus own: the same of the last model only. after next: on the windows after that."
    )
    return "\n".join([text, "", *markdown_table(["variant", *MATRIX_COLUMNS.values()], rows)])


def _percent(value: Found | None, sign: str = "") -> str:
    if value is None or value["mean"] is None:
        return ""
    error = "" if value["se"] is None else f" ± {100 * value['se']:.2f}"
    return f"{100 * value['mean']:{sign}.2f}{error}"


def _number(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def write_plots(found: Mapping[str, Found], title: str, path: Path) -> list[Path]:
    """Draw the comparison into a PNG file, and matrices, if there are any, into a second one next to it."""
    written = plots.write(partial(draw, found, title), path)
    matrix_path = path.with_name(f"{path.stem}-matrix{path.suffix}")
    return written + plots.write(partial(draw_matrices, found, title), matrix_path)


def draw(found: Mapping[str, Found], title: str) -> Any:
    """Draw HR@10 of every variant, its paired difference to the base, and HR@10 of each window."""
    from matplotlib.ticker import MaxNLocator

    figure, (rates, differences, windows) = plots.figure(3, height=max(4.2, 0.4 * len(found) + 1.6))
    names = list(found)
    for panel, values, marker in (
        (rates, [found[name]["HR@10"] for name in names], "o"),
        (differences, [(found[name]["difference"] or {}).get("HR@10") for name in names], "s"),
    ):
        known = [(row, value) for row, value in enumerate(values) if value is not None and value["mean"] is not None]
        panel.errorbar(
            [100 * value["mean"] for _, value in known],
            [row for row, _ in known],
            xerr=[100 * (value["se"] or 0.0) for _, value in known],
            fmt=marker,
            color=BLUE,
            capsize=3,
        )
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlabel("%")
    rates.set_title("HR@10, mean ± standard error over seeds")
    differences.set_title(f"Difference to {BASE}, paired by seed")
    differences.axvline(0, color=GREY, linewidth=1)
    for number, name in enumerate(names):
        tested = found[name]["windows"]
        style, colour = ("-", "--", ":")[number // len(CYCLE) % 3], CYCLE[number % len(CYCLE)]
        means = [100 * value["mean"] if value["mean"] is not None else np.nan for value in tested.values()]
        windows.plot([int(window) for window in tested], means, style, marker=".", color=colour, label=name)
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
