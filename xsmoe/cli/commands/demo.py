"""Command `xsmoe demo`: all stages on a synthetic, drifting catalogue."""

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
    """Settings of the demo.

    Attributes:
        windows: number of windows in the stream, at least 2.
        epochs: largest number of epochs for a window.
        users, items: size of the catalogue, see `write_catalogue`.
        seed: seed of the catalogue, the encoders and the training.
    """

    windows: int = 6
    epochs: int = 12
    users: int = 800
    items: int = 600
    seed: int = 0


def demo(folder: Path, settings: DemoSettings, display: Display, *, fresh: bool = False) -> None:
    """Create the catalogue and the encoders, encode, train and report. Finished stages are skipped.

    Args:
        folder: folder for all files; also the run's folder.
        settings: settings of the demo.
        display: display of the command.
        fresh: remove the files of an earlier demo in the folder first.

    Raises:
        ValueError: the folder has other files, or a demo with other settings.
    """
    start = time.monotonic()
    StreamConfig(epochs=settings.epochs, seed=settings.seed)  # raises before any file is written
    _claim(folder, settings, fresh=fresh)
    if _finished(folder):
        _show_again(folder, display)
        return
    display.heading("1. Drifting catalogue: synthetic items with images and captions, and a log of interactions")
    try:
        _catalogue(folder / "catalogue", settings, display)
    except ValueError:
        # With invalid settings of the catalogue the folder must not be marked as a demo.
        (folder / MARK).unlink()
        raise
    display.heading("2. Frozen encoders (small, with random weights) and the hidden states of all items")
    _encode(folder, settings, display)
    display.heading(f"3. Training on {settings.windows} windows; each model is tested on the next window")
    given = {
        "dataset": folder / "catalogue",
        "store": folder / "store",
        "windows": settings.windows,
        "epochs": settings.epochs,
        "seed": settings.seed,
        **TRAINING,
        # The demo shows how experts are added and pruned.
        "expand": True,
        "prune": True,
    }
    with _one_thread():
        train(folder, given, display)
    display.say(f"The demo took {time.monotonic() - start:.0f} s. Try: xsmoe recommend {folder} user-00001")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread. The tensors of the demo are too small for several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _claim(folder: Path, settings: DemoSettings, *, fresh: bool) -> None:
    mark = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; choose another one with --folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not mark.is_file():
            raise ValueError(f"{folder} has files that are not from a demo; choose another folder with --folder")
        if fresh:
            # The mark is removed last, so that the folder is still recognized as a demo after an interruption.
            for path in sorted(folder.iterdir(), key=lambda path: path == mark):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            saved = json.loads(mark.read_text())
            wanted = asdict(settings)
            if differences := [
                f"{name} {saved.get(name)}, not {wanted[name]}" for name in wanted if saved.get(name) != wanted[name]
            ]:
                raise ValueError(
                    f"{folder} has a demo with {'; '.join(differences)}; use the same settings, another folder with "
                    "--folder, or --fresh to start again"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, (json.dumps(asdict(settings)) + "\n").encode())


def _finished(folder: Path) -> bool:
    done = sum(line["kind"] == "window" for line in read_metrics(folder))
    return done > 0 and done >= RunConfig.read(folder).windows


def _show_again(folder: Path, display: Display) -> None:
    metrics = read_metrics(folder)
    display.say(f"The demo in {folder} is finished; use --fresh to start again.")
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
