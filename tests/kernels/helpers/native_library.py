"""Helpers for tests of the native library: skip conditions, and a subprocess with another library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import xsmoe_kernels
from xsmoe_kernels.backends import cpu as cpu_backend

ROOT = Path(xsmoe_kernels.__file__).parents[1]
TESTS = Path(__file__).parent

needs_library = pytest.mark.skipif(cpu_backend.library is None, reason=cpu_backend.describe().get("unavailable", ""))


def run_python(*arguments: str, library: Path | None = cpu_backend.library, **variables: str) -> str:
    """Return the output of another Python with these arguments, environment variables and native library.

    It can import the package and these helpers. If it fails, the error contains its output.
    """
    found = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": found, "XSMOE_NATIVE_LIBRARY": str(library or ""), **variables}
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout
