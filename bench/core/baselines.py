"""Baselines from libraries that may be missing: their import, and a trial run before they are checked."""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from bench.core.benchmark import Absent
from bench.core.memory import first_line, is_out_of_memory

DEVICES = ("cuda",)
"""The devices that the kernels of these libraries support."""


def load_library(name: str, module: str, device: torch.device) -> ModuleType:
    """Import a module of the library `name`.

    Raises:
        Absent: its kernels do not support the device, or it cannot be imported.
    """
    if device.type not in DEVICES:
        raise Absent(f"{name} needs a CUDA device, not {device.type}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{name} is not installed: {first_line(error)}") from error
    except Exception as error:
        raise Absent(f"{name} cannot be imported: {first_line(error)}") from error


def try_library(name: str, run: Callable[[], object]) -> None:
    """Run a library once on a small problem.

    Raises:
        Absent: it fails; the message is the library's.
    """
    try:
        run()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise Absent(f"{name} fails here: {first_line(error)}") from error
