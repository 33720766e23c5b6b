"""The file of tuned choices: JSON that several processes may write and that may be deleted at any time."""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "triton_tuning.json"
SCHEMA = 1

_warned: set[str] = set()


def read(folder: Path) -> dict[str, Any]:
    """Return the choices by key; none without a file. Warn if the file cannot be read."""
    path = folder / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _warn(path, f"{path} cannot be read ({error}); its kernels are tuned again")
        return {}
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("choices"), dict):
        _warn(path, f"{path} has no tuned choices of schema {SCHEMA}; its kernels are tuned again")
        return {}
    return dict(data["choices"])


def add(folder: Path, entry: str, choice: Any) -> None:
    """Add a choice to those in the file. Warn if the folder cannot be written."""
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            choices = read(folder) | {entry: choice}
            _replace(path, json.dumps({"schema": SCHEMA, "choices": choices}, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        _warn(folder, f"{path} cannot be written ({error}); tuned choices last as long as this process")


def _replace(path: Path, text: str) -> None:
    """Replace the file atomically: readers see the old one or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the file against other writers if the file system supports it; one of two choices may be lost otherwise."""
    with open(folder / f".{NAME}.lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def _warn(about: Path, text: str) -> None:
    if str(about) not in _warned:
        _warned.add(str(about))
        warnings.warn(text, RuntimeWarning, stacklevel=2)
