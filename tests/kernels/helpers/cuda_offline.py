"""Registers, spills and shared memory of the CUDA kernels by nvcc, for each architecture, without a GPU.

    python -m tests.kernels.helpers.cuda_offline [--write]

builds them in a separate folder and prints the numbers; --write makes them the budget of test_cuda_build.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
BUDGET = Path(__file__).parents[1] / "backends" / "cuda_budget.json"


class Found(NamedTuple):
    """Resources of a kernel on an architecture: registers of a thread, all others in bytes."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int


def build(architectures: str = "") -> str:
    """Compile and link the library and return the compiler's output.

    Args:
        architectures: the GPUs, as TORCH_CUDA_ARCH_LIST names them; by default those of an ordinary build.

    Raises:
        RuntimeError: it does not compile or link.
    """
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XSMOE_") and name != "LD_PRELOAD"}
    asked = {**kept, "XSMOE_CUDA_ASIDE": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    ran = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not build:\n{ran.stdout}\n{ran.stderr}")
    return ran.stdout + ran.stderr


def logs() -> list[Path]:
    """Return nvcc's output for each source in the latest build of this Python and torch."""
    library = ROOT / "build" / "cuda" / "libxsmoe_cuda.so"
    folders = [path for path in ROOT.glob("build/cuda-*") if (path / library.name).exists()]
    same = [path for path in folders if (path / library.name).read_bytes() == library.read_bytes()]
    return sorted(path for folder in same[:1] for path in folder.glob("*.cu.o.log"))


def parse(text: str) -> list[Found]:
    """Return the report of ptxas -v for each kernel."""
    found = []
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for one in pattern.finditer(text):
        shared = re.search(r"(\d+) bytes smem", one["rest"])
        spilled = int(one["stores"]) + int(one["loads"])
        sizes = int(one["registers"]), int(one["stack"]), spilled, int(shared[1]) if shared else 0
        found.append(Found(one["kernel"], f"sm_{one['architecture']}", *sizes))
    names = readable([one.kernel for one in found])
    return sorted(one._replace(kernel=name) for one, name in zip(found, names, strict=True))


def readable(mangled: list[str]) -> list[str]:
    """Return demangled names, with template arguments and without parameters."""
    ran = subprocess.run(["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    plain = []
    for name in ran.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|xsmoe::|cuda::", "", name)
        plain.append(name.removeprefix("void ").replace(" >", ">"))
    return plain


def measure(architectures: str = "") -> list[Found]:
    """Build, and return the resources of all kernels."""
    build(architectures)
    return [one for path in logs() for one in parse(path.read_text())]


def as_budget(found: list[Found], nvcc: str) -> dict[str, object]:
    """Return the content of BUDGET."""
    kernels: dict[str, dict[str, int]] = {}
    for one in found:
        kernels.setdefault(one.kernel, {})[one.architecture] = one.registers
    return {"nvcc": nvcc, "registers": kernels}


def nvcc_version() -> str:
    """Return the version of the toolkit that the build uses."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import build_cuda

    return build_cuda.toolkit(None).version


def main() -> None:
    """Print the resources, and write the budget if requested."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the budget")
    options = parser.parse_args()
    found = measure()
    for one in found:
        print(
            f"{one.architecture:7} {one.registers:4} registers, {one.stack + one.spilled:4} bytes of local memory, "
            f"{one.shared:6} bytes of shared memory  {one.kernel}"
        )
    if options.write:
        BUDGET.write_text(json.dumps(as_budget(found, nvcc_version()), indent=2) + "\n")


if __name__ == "__main__":
    main()
