"""The plot of README.md: speed-ups over named baselines, from the committed results.

The SVG file has a transparent background and grey text, so that it is readable on light and on dark pages. The plotted
numbers are in its metadata, so that a check without matplotlib finds a stale plot.
"""

import io
import json
import re
from html import unescape

from bench.core.machine import ROOT
from bench.core.results import Role
from bench.report import docs_results

PATH = ROOT / "docs" / "images" / "speedups.svg"
TEXT = "#848d97"
"""A grey with a contrast of more than 3 to white and to black."""
COLOURS = {Role.PAPER: "#e0564f", Role.EAGER: "#4c8dd6", Role.COMPILED: "#3fa45b"}


def data() -> dict[str, dict[str, float]]:
    """Return the plotted speed-ups: for each headline, those over each baseline."""
    return {
        f"{one.headline.label}\n{one.headline.size}": {
            docs_results.ROLES[role]: float(f"{best.median:.3g}") for role, (_, best) in one.baselines.items()
        }
        for one in docs_results.headlines()
    }


def up_to_date() -> bool:
    """Return whether the committed plot shows the committed results."""
    if not PATH.exists():
        return False
    description = re.search(r"<dc:description>(.*?)</dc:description>", PATH.read_text(), re.DOTALL)
    return description is not None and unescape(description[1]) == _description()


def write() -> None:
    """Draw the plot (matplotlib)."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "xsmoe",
        "font.size": 10,
        "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), TEXT),
    }
    found = data()
    svg = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 0.5 * len(found) + 1.0), layout="constrained")
        FigureCanvasSVG(figure)
        panel = figure.subplots()
        height = 0.26
        for place, (role, name) in enumerate(docs_results.ROLES.items()):
            bars = [(y + (place - 1) * height, one[name]) for y, one in enumerate(found.values()) if name in one]
            panel.barh(
                [y for y, _ in bars], [x - 1 for _, x in bars], height * 0.9, left=1, color=COLOURS[role], label=name
            )
            for y, x in bars:
                panel.annotate(f"{x:.3g}", (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
        panel.set_xscale("log")
        panel.set_xlim(0.9, 180)
        panel.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        panel.minorticks_off()
        panel.axvline(1, color=TEXT, linewidth=1)
        panel.set_yticks(range(len(found)), list(found))
        panel.invert_yaxis()
        panel.tick_params(axis="y", length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_xlabel(
            "times as fast (forward and backward, or forward if there is no backward), two CPU cores, float32"
        )
        panel.legend(loc="lower right", frameon=False, title="baseline")
        metadata = {"Date": None, "Creator": None, "Title": "Speed-ups", "Description": _description()}
        figure.savefig(svg, format="svg", transparent=True, metadata=metadata)
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text("\n".join(line.rstrip() for line in svg.getvalue().splitlines()) + "\n")


def _description() -> str:
    # One line, as matplotlib writes it.
    return json.dumps(data())
