"""Where tests of CUDA kernels run: on a GPU if there is one, else on a CPU whose threads emulate one.

Without a GPU, importing this builds the emulation, which takes seconds the first time, and loads it; XSMOE_CUDA_LIBRARY
names another one, for example one with sanitizers.
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
    """Loads the emulation; why there is nothing to build it with, or None."""
    if not (ROOT / "setup.py").exists():
        return "there are no sources beside the package"
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
