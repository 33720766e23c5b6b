"""The CUDA part of the build: the toolkit, the GPUs to compile for, and the flags."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

LIBRARY = "libxsmoe_cuda.so"
FAILURE = "_cuda_build_failure.txt"
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0")
"""The default of TORCH_CUDA_ARCH_LIST, as far as nvcc supports it. The last one is compiled to PTX too."""
OLDEST = 80
"""Older GPUs have neither asynchronous copies nor warp reductions in hardware."""
OLDEST_NVCC = 12
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")

FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
EMULATED = "-DXSMOE_EMULATE_CUDA"

# The log next to an object contains ptxas' report on registers, spills and shared memory.
RULE = """\
rule nvcc
  command = $nvcc $flags -Xptxas=-v -MD -MF $out.d -c $in -o $out >$out.log 2>&1 || { cat $out.log; exit 1; }
  depfile = $out.d
  deps = gcc
  description = compile $out
"""


class Unavailable(Exception):
    """The CUDA kernels cannot be built. The message says why, and what to do."""


class Toolkit(NamedTuple):
    """A CUDA toolkit and the GPUs to compile for."""

    nvcc: str
    version: str
    root: Path
    architectures: tuple[str, ...]

    def targets(self) -> list[str]:
        """Return nvcc's flags that select the GPUs."""
        flags = []
        for one in self.architectures:
            number = one.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if one.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def wanted(torch_cuda: str | None) -> bool:
    """Return whether to build CUDA kernels for a torch of this CUDA version; None is a torch without CUDA."""
    return torch_cuda is not None or forced()


def forced() -> bool:
    """Return whether FORCE_CUDA requests the kernels for any torch. A missing tool is then an error."""
    return os.environ.get("FORCE_CUDA", "0") not in ("", "0")


def toolkit(torch_cuda: str | None) -> Toolkit:
    """Return the toolkit to build with.

    Raises:
        Unavailable: there is none, or it does not match torch's CUDA version or TORCH_CUDA_ARCH_LIST.
    """
    if os.environ.get("XSMOE_NO_CUDA", "0") not in ("", "0"):
        raise Unavailable("XSMOE_NO_CUDA was set when this package was built; unset it")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home, "bin", "nvcc"))] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None:
        where = f"in {candidates[0]}, where CUDA_HOME points" if home else "on PATH or in /usr/local/cuda"
        raise Unavailable(f"nvcc was not found {where}; install a CUDA toolkit and name it in CUDA_HOME")
    version = _version(nvcc)
    if int(version.split(".")[0]) < OLDEST_NVCC:
        raise Unavailable(f"nvcc {version} is too old; name a toolkit of CUDA {OLDEST_NVCC} or newer in CUDA_HOME")
    if torch_cuda is not None and version.split(".")[0] != torch_cuda.split(".")[0]:
        raise Unavailable(
            f"nvcc is of CUDA {version} and torch of CUDA {torch_cuda}; name a toolkit of torch's version in CUDA_HOME"
        )
    root = _root(nvcc)
    if not (root / "include" / "cuda_runtime.h").exists():
        raise Unavailable(f"{root} has no include/cuda_runtime.h; install the whole CUDA toolkit")
    return Toolkit(nvcc, version, root, architectures(nvcc))


def architectures(nvcc: str) -> tuple[str, ...]:
    """Return the GPUs to compile for, such as "9.0" and "10.0+PTX". GPUs that are too old are skipped."""
    known = set(re.findall(r"compute_(\d+[af]?)", _output(nvcc, "--list-gpu-arch")))
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,"))
    if asked == [""]:
        usual = [one for one in ARCHITECTURES if one.replace(".", "") in known]
        return *usual[:-1], f"{usual[-1]}+PTX"
    chosen = []
    for one in asked:
        number = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", one)
        if number is None:
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST names {one!r}, which is not a version such as 9.0 or 9.0+PTX")
        if int(re.sub(r"\D", "", number[1] + number[2])) < OLDEST:
            continue
        # Not every nvcc lists the variants of an architecture that it supports, such as 9.0a.
        if re.sub(r"\D", "", number[1] + number[2]) not in {re.sub(r"\D", "", name) for name in known}:
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST names {one}, which {nvcc} does not compile for")
        chosen.append(one)
    if not chosen:
        raise Unavailable(f"TORCH_CUDA_ARCH_LIST names {', '.join(asked)}; the CUDA kernels need 8.0 or newer")
    return tuple(dict.fromkeys(chosen))


def host_compiler(cxx: list[str]) -> list[str]:
    """Return nvcc's flags that select the host compiler, without a launcher such as ccache."""
    return ["-ccbin", next((word for word in cxx if Path(word).name not in LAUNCHERS), cxx[0])]


def try_out(tools: Toolkit, cxx: list[str]) -> None:
    """Compile an empty file for one GPU. Many toolkits reject a host compiler that is newer than they are.

    Raises:
        Unavailable: it does not compile.
    """
    command = [tools.nvcc, *FLAGS, tools.targets()[0], *host_compiler(cxx), "-x", "cu", "-c", os.devnull]
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run([*command, "-o", str(Path(folder, "empty.o"))], capture_output=True, text=True)
    if ran.returncode != 0:
        error = next(
            (line for line in (ran.stdout + ran.stderr).splitlines() if "error" in line), f"code {ran.returncode}"
        )
        raise Unavailable(
            f"{tools.nvcc} does not compile with {shlex.join(cxx)}: {error}; name another compiler in CXX"
        )


def _version(nvcc: str) -> str:
    found = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if found is None:
        raise Unavailable(f"{nvcc} does not print its version; name another toolkit in CUDA_HOME")
    return found[1]


def _root(nvcc: str) -> Path:
    # nvcc may be a link or a script that calls the real one. That one prints where its toolkit is.
    top = re.search(r"^#\$ TOP=(.*)$", _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]


def _output(nvcc: str, *arguments: str) -> str:
    try:
        ran = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{nvcc} does not run: {error}") from error
    return ran.stdout + ran.stderr


def compile_flags(tools: Toolkit) -> list[str]:
    """Return nvcc's flags for kernels. nvcc itself adds those of $NVCC_APPEND_FLAGS."""
    return [*FLAGS, *tools.targets()]


def link_flags(tools: Toolkit) -> list[str]:
    """Return the flags that link the CUDA runtime statically, so that loading the library does not need it."""
    folders = [folder for folder in (tools.root / "lib64", tools.root / "lib") if folder.exists()]
    return [*(f"-L{folder}" for folder in folders), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def facts(tools: Toolkit | None, compiler: str, torch_version: str) -> dict[str, object]:
    """Return the facts of the build, which the library contains. Without a toolkit it is the emulation."""
    return {
        "emulated": tools is None,
        "compiler": compiler if tools is None else f"nvcc {tools.version}, {compiler}",
        "architectures": [] if tools is None else list(tools.architectures),
        "flags": shlex.join(FLAGS if tools else [EMULATED]),
        "torch": torch_version,
    }
