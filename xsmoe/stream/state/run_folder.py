"""The files of a run: metrics line by line, the windows it has taken, its checkpoints, and a lock."""

import fcntl
import hashlib
import io
import json
import os
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np

from xsmoe.data import Window
from xsmoe.nn import Recommender
from xsmoe.stream.state.checkpoints import CheckpointError, Checkpoints, write_atomically
from xsmoe.stream.state.saved_conditions import SavedConditions

WINDOWS = "windows"


class RunFolder:
    """A run's folder, held by one process at a time.

    Raises:
        ValueError: another process trains in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.conditions = SavedConditions(path / "checkpoints")
        self._windows = path / WINDOWS
        self._windows.mkdir(exist_ok=True)
        self._metrics = path / "metrics.jsonl"
        self._lock: IO[str] | None = _hold(path / ".lock")
        if not self._metrics.exists():
            write_atomically(self._metrics, b"")

    def close(self) -> None:
        """Lets another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl and syncs it to disk."""
        try:
            with open(self._metrics, "a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._metrics}: {error.strerror}; make room and run the same command again"
            ) from error

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self._metrics.stat().st_size

    def rewind(self, size: int) -> list[dict[str, Any]]:
        """Cuts metrics.jsonl to what a checkpoint knows of, and returns its lines.

        Raises:
            CheckpointError: the file is shorter than the checkpoint says.
        """
        if self.metrics_size() < size:
            raise CheckpointError(f"{self._metrics} has been shortened since the last checkpoint; restore it")
        if size < self.metrics_size():
            os.truncate(self._metrics, size)
        return read_metrics(self.path)

    def export(self, model: Recommender) -> None:
        """Replaces the exported model, which `Recommender.from_pretrained` loads.

        Raises:
            CheckpointError: the disk is full or cannot be written.
        """
        folder = self.path / "model"
        try:
            model.save_pretrained(folder)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror}; make room and run again") from error

    def save_window(self, window: Window) -> None:
        """Keeps a window's interactions, which later windows need to know what was seen."""
        buffer = io.BytesIO()
        np.savez(buffer, users=window.users, items=window.items, timestamps=window.timestamps)
        write_atomically(self._windows / f"{window.number:04d}.npz", buffer.getvalue())

    def load_window(self, number: int, digest: str) -> Window:
        """A window that was saved, checked against its digest."""
        window = read_window(self.path, number)
        if window_digest(window) != digest:
            raise CheckpointError(
                f"window {number} in {self._windows} is not the one that the checkpoint was made with; restore it"
            )
        return window


def window_digest(window: Window) -> str:
    """A digest of a window's interactions."""
    digest = hashlib.sha256()
    for array in (window.users, window.items, window.timestamps):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without one that is half written; none where there is no such file yet."""
    file = path / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}; restore it") from error


def read_window(path: Path, number: int) -> Window:
    """A window that a run has taken, by its place in the stream.

    Raises:
        CheckpointError: its file is missing or damaged.
    """
    file = path / WINDOWS / f"{number:04d}.npz"
    try:
        with np.load(file) as arrays:
            return Window(number, arrays["users"], arrays["items"], arrays["timestamps"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise CheckpointError(f"{file}, which the run needs to go on, cannot be read: {error}") from error


def _hold(path: Path) -> IO[str]:
    file = open(path, "w")  # noqa: SIM115 - held for as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"{path.parent} is in use by another process; wait for it, or use another folder") from error
    return file
