"""What all pictures of the bench share: how they look, and how they come to be files."""

import importlib.util
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xsmoe.atomic_files import replace_file
from xsmoe.report.style import DPI, STYLE


def missing() -> bool:
    """Whether there is nothing to draw with."""
    return importlib.util.find_spec("matplotlib") is None


def announced(written: Callable[[], list[Path]]) -> None:
    """Draws, and says where the pictures are or why there are none."""
    if missing():
        print("\n--plot: no pictures, because matplotlib is not installed (pip install matplotlib)", flush=True)
    else:
        print(f"\npictures: {', '.join(map(str, written()))}", flush=True)


def write(draw: Callable[[], Any], path: Path) -> list[Path]:
    """Draws a figure into a PNG file, which is replaced in one step; nothing where there is no figure."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = draw()
        if figure is None:
            return []
        picture = io.BytesIO()
        figure.savefig(picture, dpi=DPI, format="png")
    replace_file(path, picture.getvalue())
    return [path]


def figure(
    panels: int, *, rows: int = 1, width: float = 5.0, height: float = 4.2, **options: Any
) -> tuple[Any, list[Any]]:
    """A figure that needs no display, and its panels, side by side in so many rows."""
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
    """One legend for all panels."""
    handles, labels = panel.get_legend_handles_labels()
    found.legend(handles, labels, loc="outside lower center", ncols=6)


def device(facts: Mapping[str, Any]) -> str:
    """What was measured on, for a title."""
    name = facts["gpu"]["name"] if "gpu" in facts else facts["cpu"]["model"]
    return f"{name}, threads: {facts['threads']}"
