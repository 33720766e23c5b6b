"""Checkpoint files: replaced atomically, synced to disk, and checked against a digest when they are read."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xsmoe.atomic_files import replace_file

MAGIC = b"XSMOE-CHECKPOINT-1\n"
DIGEST_SIZE = hashlib.sha256().digest_size
START = len(MAGIC) + DIGEST_SIZE
"""Offset of the payload."""
KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used. The message gives the reason and a remedy."""


class Checkpoints:
    """Numbered checkpoints of a run. The newest two are kept.

    Args:
        folder: folder of the checkpoints; created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, payload: dict[str, Any]) -> Path:
        """Write the next checkpoint atomically, then delete all but the newest two.

        Args:
            payload: tensors and plain values, nested in dicts and lists.

        Raises:
            CheckpointError: the disk is full or not writable. Earlier checkpoints are unchanged.
        """
        paths = self._paths()
        path = write_payload(payload, self.folder / f"{int(paths[-1].stem) + 1 if paths else 0:06d}.ckpt")
        for old in [*paths, path][:-KEPT]:
            old.unlink(missing_ok=True)
        return path

    def load_newest(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest undamaged checkpoint, or None if there are no checkpoints.

        Args:
            warn: called with a message for each damaged checkpoint that is skipped.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        damaged: dict[Path, CheckpointError] = {}
        for path in reversed(self._paths()):
            try:
                payload = read_payload(path)
            except CheckpointError as error:
                damaged[path] = error
                continue
            for other, fault in damaged.items():
                warn(f"{fault}; resuming from the previous checkpoint")
                other.rename(other.with_suffix(".damaged"))
            return path, payload
        if damaged:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged; start a new run in another folder")
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.ckpt"))


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace the content of `path` atomically.

    Raises:
        CheckpointError: the disk is full or not writable. The previous content of `path` is unchanged.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path} ({len(content)} bytes): {error.strerror}; files saved earlier are unchanged, so free "
            "disk space and run the same command again"
        ) from error


def write_payload(payload: dict[str, Any], path: Path) -> Path:
    """Write tensors and plain values, nested in dicts and lists, and their digest atomically.

    Raises:
        CheckpointError: the disk is full or not writable. The previous content of `path` is unchanged.
    """
    # The buffer is the only copy, because a table of ID embeddings can have gigabytes.
    buffer = io.BytesIO()
    buffer.write(MAGIC + bytes(DIGEST_SIZE))
    torch.save(payload, buffer)
    content = buffer.getbuffer()
    content[len(MAGIC) : START] = hashlib.sha256(content[START:]).digest()
    write_atomically(path, content)
    return path


def read_payload(path: Path) -> dict[str, Any]:
    """Return the payload that `write_payload` wrote, after checking its digest.

    Raises:
        CheckpointError: the file is damaged.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of this version")
    if hashlib.sha256(content[START:]).digest() != content[len(MAGIC) : START]:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    payload: dict[str, Any] = torch.load(io.BytesIO(content[START:]), map_location="cpu", weights_only=True)
    return payload
