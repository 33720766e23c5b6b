"""Plots of results (matplotlib)."""

import importlib.util
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xsmoe.atomic_files import replace_file
from xsmoe.report.style import DPI, STYLE


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
