"""Files that are replaced in one step, so that a reader finds the old content or the new one, and never a part."""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Writes `content` aside, syncs it, and renames it to `path`.

    Raises:
        OSError: what was at `path` before is still there, and nothing is left aside.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Puts the names in `folder` on disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
