"""A comparison of variants in pictures: differences to the base, windows, and matrices of models and windows."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import pictures
from bench.quality.variants import BASE
from xsmoe.report.style import BLUE, CYCLE, GREY

Found = Mapping[str, Any]
COLUMNS = 5
"""Heat maps in a row."""


def write(found: Mapping[str, Found], title: str, path: Path) -> list[Path]:
    """Draw the comparison into a PNG file and, where there are matrices, these into another one beside it."""
    written = pictures.write(partial(draw, found, title), path)
    beside = path.with_name(f"{path.stem}-matrix{path.suffix}")
    return written + pictures.write(partial(draw_matrices, found, title), beside)


def draw(found: Mapping[str, Found], title: str) -> Any:
    """HR@10 of every variant, its paired difference to the base, and HR@10 window by window."""
    from matplotlib.ticker import MaxNLocator

    figure, (rates, differences, windows) = pictures.figure(3, height=max(4.2, 0.4 * len(found) + 1.6))
    names = list(found)
    for panel, values, marker in (
        (rates, [found[name]["HR@10"] for name in names], "o"),
        (differences, [(found[name]["difference"] or {}).get("HR@10") for name in names], "s"),
    ):
        known = [
            (place, value) for place, value in enumerate(values) if value is not None and value["mean"] is not None
        ]
        panel.errorbar(
            [100 * value["mean"] for _, value in known],
            [place for place, _ in known],
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
    for place, name in enumerate(names):
        tested = found[name]["windows"]
        style = ("-", "--", ":")[place // len(CYCLE) % 3]
        means = [100 * value["mean"] if value["mean"] is not None else np.nan for value in tested.values()]
        colour = CYCLE[place % len(CYCLE)]
        windows.plot([int(number) for number in tested], means, style, marker=".", color=colour, label=name)
    windows.set(title="HR@10 by tested window, mean over seeds", xlabel="window", ylabel="%", ylim=(0, None))
    windows.xaxis.set_major_locator(MaxNLocator(integer=True))
    windows.legend(fontsize=7)
    figure.suptitle(title)
    return figure


def draw_matrices(found: Mapping[str, Found], title: str) -> Any:
    """HR@10 of every window's model on every window as heat maps of one scale; None where there is no matrix."""
    from matplotlib.ticker import MaxNLocator

    matrices = {name: np.array(one["matrix"]["HR@10"]["mean"], float) for name, one in found.items() if one["matrix"]}
    if not matrices:
        return None
    figure, panels = pictures.figure(len(matrices), rows=-(-len(matrices) // COLUMNS), width=3.6, height=3.6)
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
