"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; checked by digest when read."""

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
"""Where the payload begins."""
KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message says why and what to do."""


class Checkpoints:
    """The numbered checkpoints of a run; the newest two are kept.

    Args:
        folder: where they lie; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, payload: dict[str, Any]) -> Path:
        """Writes the next checkpoint in one step and drops all but the newest two.

        Args:
            payload: tensors and plain values, nested in dicts and lists.

        Raises:
            CheckpointError: the disk is full or cannot be written; the checkpoints before it are untouched.
        """
        paths = self._paths()
        path = write_payload(payload, self.folder / f"{int(paths[-1].stem) + 1 if paths else 0:06d}.ckpt")
        for old in [*paths, path][:-KEPT]:
            old.unlink(missing_ok=True)
        return path

    def load_newest(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        Args:
            warn: told of each damaged checkpoint that is passed over.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        damaged: dict[Path, CheckpointError] = {}
        for path in reversed(self._paths()):
            try:
                payload = read_payload(path)
            except CheckpointError as error:
                damaged[path] = error
                continue
            for other, fault in damaged.items():
                warn(f"{fault}; going on from the checkpoint before it")
                other.rename(other.with_suffix(".damaged"))
            return path, payload
        if damaged:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged; start the run anew in another folder")
        return None

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.ckpt"))


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replaces `path` in one step.

    Raises:
        CheckpointError: the disk is full or cannot be written; what stood at `path` still stands there.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path} ({len(content)} bytes): {error.strerror}; what was saved before is untouched, so "
            "make room and run the same command again"
        ) from error


def write_payload(payload: dict[str, Any], path: Path) -> Path:
    """Write tensors and plain values, nested in dicts and lists, and their digest in one step.

    Raises:
        CheckpointError: the disk is full or cannot be written; what stood at `path` still stands there.
    """
    # Held once: a table of IDs can make it gigabytes.
    buffer = io.BytesIO()
    buffer.write(MAGIC + bytes(DIGEST_SIZE))
    torch.save(payload, buffer)
    content = buffer.getbuffer()
    content[len(MAGIC) : START] = hashlib.sha256(content[START:]).digest()
    write_atomically(path, content)
    return path


def read_payload(path: Path) -> dict[str, Any]:
    """Read what `write_payload` wrote, checked by its digest.

    Raises:
        CheckpointError: the file is damaged.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path} is no checkpoint of this version")
    if hashlib.sha256(content[START:]).digest() != content[len(MAGIC) : START]:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    payload: dict[str, Any] = torch.load(io.BytesIO(content[START:]), map_location="cpu", weights_only=True)
    return payload
