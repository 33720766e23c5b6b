"""Device of the tests of CUDA kernels: a GPU if there is one, else an emulation on the CPU.

Without a GPU, the import builds the emulation, which needs seconds the first time, and loads it. XSMOE_CUDA_LIBRARY
selects another library, for example one with sanitizers.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.helpers.native_library import ROOT
from xsmoe_kernels.backends import cpu as cpu_backend
from xsmoe_kernels.backends import cuda as cuda_backend
from xsmoe_kernels.runtime import dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def _emulate() -> str | None:
    """Load the emulation; return why it cannot be built, or None."""
    if not (ROOT / "setup.py").exists():
        return "the package has no source tree"
    if cpu_backend.library is None:
        return str(cpu_backend.describe()["unavailable"])
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=ROOT,
        env={**os.environ, "XSMOE_EMULATE_CUDA": "1", "XSMOE_SANITIZE": "", "XSMOE_EMULATE_AMX": ""},
        capture_output=True,
        text=True,
    )
    if built.returncode != 0:
        raise RuntimeError(f"the emulated CUDA kernels do not build:\n{built.stdout}\n{built.stderr}")
    os.environ["XSMOE_CUDA_LIBRARY"] = str(ROOT / "build" / "emulate-cuda" / cuda_backend.LIBRARY)
    cuda_backend.load()
    return None


reason = None
if not ON_GPU and cuda_backend.library is None:
    reason = _emulate()
reason = reason or dispatch.unavailable_reason(next(iter(cuda_backend.OPERATORS)), "cuda", DEVICE, torch.float32)
needs_cuda_kernels = pytest.mark.skipif(reason is not None, reason=reason or "")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
