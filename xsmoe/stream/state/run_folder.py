"""Files of a run: metrics, the interactions of its windows, checkpoints, and a lock."""

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
    """Folder of a run, locked by one process at a time.

    Raises:
        ValueError: another process has locked the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.conditions = SavedConditions(path / "checkpoints")
        self._windows = path / WINDOWS
        self._windows.mkdir(exist_ok=True)
        self._metrics = path / "metrics.jsonl"
        self._lock: IO[str] | None = _acquire_lock(path / ".lock")
        if not self._metrics.exists():
            write_atomically(self._metrics, b"")

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and sync the file to disk."""
        try:
            with open(self._metrics, "a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._metrics}: {error.strerror}; free disk space and run the same command again"
            ) from error

    def metrics_size(self) -> int:
        """Return the size of metrics.jsonl in bytes."""
        return self._metrics.stat().st_size

    def rewind(self, size: int) -> list[dict[str, Any]]:
        """Truncate metrics.jsonl to the size recorded in a checkpoint, and return its lines.

        Raises:
            CheckpointError: the file is shorter than that.
        """
        if self.metrics_size() < size:
            raise CheckpointError(f"{self._metrics} is shorter than at the last checkpoint; restore it from a backup")
        if size < self.metrics_size():
            os.truncate(self._metrics, size)
        return read_metrics(self.path)

    def export(self, model: Recommender) -> None:
        """Replace the exported model, which `Recommender.from_pretrained` loads.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        folder = self.path / "model"
        try:
            model.save_pretrained(folder)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror}; free disk space and run again") from error

    def save_window(self, window: Window) -> None:
        """Save a window's interactions. A resumed run reads them to restore the users' seen items."""
        buffer = io.BytesIO()
        np.savez(buffer, users=window.users, items=window.items, timestamps=window.timestamps)
        write_atomically(self._windows / f"{window.number:04d}.npz", buffer.getvalue())

    def load_window(self, number: int, digest: str) -> Window:
        """Return a saved window, after checking its digest."""
        window = read_window(self.path, number)
        if window_digest(window) != digest:
            raise CheckpointError(
                f"window {number} in {self._windows} differs from the one in the checkpoint; restore it from a backup"
            )
        return window


def window_digest(window: Window) -> str:
    """Return a digest of a window's interactions."""
    digest = hashlib.sha256()
    for array in (window.users, window.items, window.timestamps):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's metrics.jsonl; an empty list if there is no such file."""
    file = path / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}; restore it from a backup") from error


def read_window(path: Path, number: int) -> Window:
    """Return a saved window by its position in the stream.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = path / WINDOWS / f"{number:04d}.npz"
    try:
        with np.load(file) as arrays:
            return Window(number, arrays["users"], arrays["items"], arrays["timestamps"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise CheckpointError(f"cannot read {file}, which the run needs to resume: {error}") from error


def _acquire_lock(path: Path) -> IO[str]:
    file = open(path, "w")  # noqa: SIM115 - stays open while the run is active
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"{path.parent} is in use by another process; wait for it, or use another folder") from error
    return file
