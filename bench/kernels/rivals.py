"""What rooms need of libraries that need not be installed: their import, and a trial before they are judged."""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from bench.shortage import first_line
from bench.workload import Absent
from xsmoe.out_of_memory import is_shortage

DEVICES = ("cuda",)
"""Where these libraries' kernels run."""


def load(name: str, module: str, device: torch.device) -> ModuleType:
    """A module of the library `name`.

    Raises:
        Absent: its kernels do not run on such a device, or it cannot be imported.
    """
    if device.type not in DEVICES:
        raise Absent(f"{name} needs a CUDA device, not {device.type}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{name} is not installed: {first_line(error)}") from error
    except Exception as error:
        raise Absent(f"{name} cannot be imported: {first_line(error)}") from error


def attempt(name: str, run: Callable[[], object]) -> None:
    """Runs a library once on a small problem.

    Raises:
        Absent: it fails, with what it says.
    """
    try:
        run()
    except Exception as error:
        if is_shortage(error):
            raise
        raise Absent(f"{name} fails here: {first_line(error)}") from error
