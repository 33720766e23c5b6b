"""What all pictures of the bench share: figures without a display, and files that are replaced in one step."""

import importlib.util
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xsmoe.files import replace_file
from xsmoe.report.plots import DPI, STYLE

ABSENT = "--plot: no pictures, because matplotlib is not installed (pip install matplotlib)"


def missing() -> bool:
    """Whether there is nothing to draw with."""
    return importlib.util.find_spec("matplotlib") is None


def write(draw: Mapping[str, Callable[[], Any]], folder: Path) -> list[Path]:
    """Writes each figure that is not None as a PNG file of that name, and returns where they are."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in ((name, one()) for name, one in draw.items()):
            if figure is None:
                continue
            picture = io.BytesIO()
            figure.savefig(picture, dpi=DPI, format="png")
            written.append(folder / f"{name}.png")
            replace_file(written[-1], picture.getvalue())
    return written


def figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure with panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = Figure(figsize=(5 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(found)
    return found, list(found.subplots(1, panels, squeeze=False)[0])


def legend_below(found: Any, panel: Any) -> None:
    """One legend for all panels."""
    handles, labels = panel.get_legend_handles_labels()
    found.legend(handles, labels, loc="outside lower center", ncols=6)


def device_name(machine: Mapping[str, Any]) -> str:
    """What the title of a figure calls the machine."""
    name = machine["gpu"]["name"] if "gpu" in machine else machine["cpu"]["model"]
    return f"{name}, threads: {machine['threads']}"
