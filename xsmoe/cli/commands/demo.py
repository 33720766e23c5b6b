"""The demonstration: a synthetic catalogue that drifts, from nothing to a report."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xsmoe.cli.commands.encode import EncodeSettings, encode
from xsmoe.cli.commands.report import write_report
from xsmoe.cli.commands.train import show_comparison, train
from xsmoe.cli.display import Display
from xsmoe.cli.run_config import RunConfig
from xsmoe.cli.training_display import TrainingDisplay
from xsmoe.data import Dataset, write_catalogue
from xsmoe.data.dataset import INTERACTIONS
from xsmoe.encoders import build_small_image_encoder, build_small_text_encoder
from xsmoe.stream import StreamConfig
from xsmoe.stream.state.checkpoints import write_atomically
from xsmoe.stream.state.run_folder import read_metrics

MARK = "demo.json"
IMAGE_SIZE = 64
TRAINING: dict[str, Any] = {
    "batch_size": 32,
    "rank": 32,
    "out_dim": 64,
}


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration does.

    Attributes:
        windows: of the stream, at least 2.
        epochs: the most epochs a window.
        users, items: of the catalogue, see `write_catalogue`.
        seed: of the catalogue, the encoders and the training.
    """

    windows: int = 6
    epochs: int = 12
    users: int = 800
    items: int = 600
    seed: int = 0


def demo(folder: Path, settings: DemoSettings, display: Display, *, fresh: bool = False) -> None:
    """Makes the catalogue and the encoders, encodes, trains and reports; a stage that is done is not done again.

    Args:
        folder: everything goes there; it is the run's folder, too.
        settings: what to do.
        display: where progress is shown.
        fresh: start anew, and remove what an earlier demonstration left in the folder.

    Raises:
        ValueError: the folder holds something else, or a demonstration of other settings.
    """
    start = time.monotonic()
    StreamConfig(epochs=settings.epochs, seed=settings.seed)  # raises before anything is made
    _claim(folder, settings, fresh=fresh)
    if _finished(folder):
        _show_again(folder, display)
        return
    display.heading("1. The drifting catalogue: synthetic items with images and captions, and a log of who took what")
    try:
        _catalogue(folder / "catalogue", settings, display)
    except ValueError:
        # Settings that no catalogue can be drawn with must not claim the folder.
        (folder / MARK).unlink()
        raise
    display.heading("2. Frozen encoders (small, with random weights) and the hidden states of all items")
    _encode(folder, settings, display)
    display.heading(f"3. Training over {settings.windows} windows, each one tested on the next")
    given = {
        "dataset": folder / "catalogue",
        "store": folder / "store",
        "windows": settings.windows,
        "epochs": settings.epochs,
        "seed": settings.seed,
        **TRAINING,
        # What it shows is how experts are added and dropped.
        "expand": True,
        "prune": True,
    }
    with _one_thread():
        train(folder, given, display)
    display.say(f"The demonstration took {time.monotonic() - start:.0f} s. Try: xsmoe recommend {folder} user-00001")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread: the demonstration's tensors are so small that more would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _claim(folder: Path, settings: DemoSettings, *, fresh: bool) -> None:
    mark = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give another one with --folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not mark.is_file():
            raise ValueError(f"{folder} holds something that is no demonstration; give another folder with --folder")
        if fresh:
            # The mark goes last, so that an interruption leaves a folder that is still known as a demonstration's.
            for path in sorted(folder.iterdir(), key=lambda path: path == mark):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            saved = json.loads(mark.read_text())
            mine = asdict(settings)
            if differences := [
                f"{name} {saved.get(name)}, not {mine[name]}" for name in mine if saved.get(name) != mine[name]
            ]:
                raise ValueError(
                    f"{folder} holds a demonstration with {'; '.join(differences)}; give the same settings, another "
                    "folder with --folder, or --fresh to start anew"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, (json.dumps(asdict(settings)) + "\n").encode())


def _finished(folder: Path) -> bool:
    done = sum(line["kind"] == "window" for line in read_metrics(folder))
    return done > 0 and done >= RunConfig.read(folder).windows


def _show_again(folder: Path, display: Display) -> None:
    metrics = read_metrics(folder)
    display.say(f"The demonstration in {folder} is finished; --fresh starts anew.")
    config = RunConfig.read(folder)
    shown = TrainingDisplay(display, config.modalities, config.windows)
    shown.past(metrics, show=True)
    shown.finish()
    show_comparison(metrics, display)
    display.say(f"Report: {write_report(folder, metrics)}")


def _catalogue(folder: Path, settings: DemoSettings, display: Display) -> None:
    if not (folder / INTERACTIONS).is_file():
        with display.progress("Drawing") as advance:
            write_catalogue(
                folder,
                seed=settings.seed,
                num_windows=settings.windows,
                users=settings.users,
                items=settings.items,
                image_size=IMAGE_SIZE,
                progress=advance,
            )
    dataset = Dataset.load(folder)
    display.say(f"{folder}: {len(dataset.interactions)} interactions with {len(dataset.items)} items")


def _encode(folder: Path, settings: DemoSettings, display: Display) -> None:
    dataset = Dataset.load(folder / "catalogue")
    text, image = folder / "encoders" / "text", folder / "encoders" / "image"
    if not text.is_dir():
        build_small_text_encoder(text, [value for value in dataset.items.texts if value], seed=settings.seed)
    if not image.is_dir():
        build_small_image_encoder(image, image_size=IMAGE_SIZE, seed=settings.seed)
    encode(dataset.folder, folder / "store", EncodeSettings(text=str(text), image=str(image)), display)
