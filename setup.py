"""The build of the native kernels. pyproject.toml holds the project's metadata.

    python setup.py build_ext --inplace

compiles csrc/ with ninja into files of xsmoe_kernels:

    libxsmoe_cpu.so      the operators for CPUs
    libxsmoe_cpu.json    the facts of that build
    libxsmoe_cuda.so     CUDA kernels for GPUs, if torch has CUDA

The libraries use LibTorch's stable ABI and nothing of Python, so that one wheel serves every Python, and every torch
from 2.11 on. If a C++ compiler, ninja, torch or nvcc is missing, the package still installs, and the reason is written
to xsmoe_kernels/_build_failure.txt or _cuda_build_failure.txt for `xsmoe_kernels.info()`. Errors in the sources fail
the build.

The build reads CXX, CXXFLAGS and LDFLAGS as other builds do. MAX_JOBS limits the number of compilers that run at once.
XSMOE_NO_NATIVE=1 leaves all native code out. The CUDA kernels need no GPU to compile:

    CUDA_HOME               the toolkit
    TORCH_CUDA_ARCH_LIST    the GPUs, such as "8.0;9.0+PTX"
    FORCE_CUDA=1            builds them for a torch without CUDA too; an error if that is impossible
    XSMOE_NO_CUDA=1         leaves them out

Builds for tests go to build/<name> and leave the package as it is:

    XSMOE_SANITIZE=1        build/sanitize, with AddressSanitizer and UndefinedBehaviorSanitizer
    XSMOE_EMULATE_AMX=1     build/emulate-amx: the instruction set amx runs wherever avx512_bf16 does, on tiles that
                            csrc/cpu/amx.h emulates; with XSMOE_SANITIZE, build/sanitize-emulate-amx
    XSMOE_BUILD_TIERS       the instruction sets to compile, such as "baseline amx", instead of all
    XSMOE_CUDA_ASIDE=1      build/cuda, libxsmoe_cuda.so alone
    XSMOE_EMULATE_CUDA=1    build/emulate-cuda, libxsmoe_cuda.so alone, for a CPU: csrc/cuda/emulated.cpp emulates the
                            threads; with XSMOE_SANITIZE, build/sanitize-emulate-cuda
"""

import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402
import build_plan  # noqa: E402
from build_plan import FACTS, LIBRARY, Toolchain  # noqa: E402

PACKAGE = "xsmoe_kernels"
FAILURE = "_build_failure.txt"
ASIDE = {
    "sanitize": "XSMOE_SANITIZE",
    "emulate-amx": "XSMOE_EMULATE_AMX",
    "cuda": "XSMOE_CUDA_ASIDE",
    "emulate-cuda": "XSMOE_EMULATE_CUDA",
}
"""Kinds of build that do not change the package, and the variables that select them."""
CUDA_ALONE = {"cuda", "emulate-cuda"}
"""Kinds without kernels for CPUs."""

MINIMUM_TORCH = (2, 11)
# Constructs of the sources that older compilers reject. Their errors would look like errors in the sources.
MODERN = """
typedef int Quad __attribute__((vector_size(16)));
Quad reversed(Quad a) { return __builtin_shufflevector(a, a, 3, 2, 1, 0); }
struct Two { int a, b; };
int sum(Two two) { const auto [a, b] = two; return [&] { return a + b; }(); }
"""


class Missing(Exception):
    """The build lacks something. The message says what, and what to do."""


def toolchain() -> Toolchain:
    """Return the tools to compile with. Raise Missing if one is not there."""
    if _is_set("XSMOE_NO_NATIVE"):
        raise Missing("XSMOE_NO_NATIVE was set when this package was built; unset it")
    if not sys.platform.startswith("linux"):
        raise Missing(f"native kernels are built on Linux only, not on {sys.platform}")
    cxx, compiler = _compiler()
    if not build_plan.accepts(cxx, ["-std=c++20"], MODERN):
        raise Missing(f"{compiler} is too old; install g++ 12 or clang 16 or newer, and name it in CXX")
    ninja = shutil.which("ninja") or _packaged_ninja()
    if ninja is None:
        raise Missing("ninja was not found when this package was built; `pip install ninja`")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise Missing("torch was not installed when this package was built; install torch and use --no-build-isolation")
    folder = Path(torch.origin).parent
    # Read the file alone: importing torch takes seconds, and a build with nothing to do should take none.
    about = runpy.run_path(str(folder / "version.py"))
    version = str(about["__version__"])
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        raise Missing(f"torch {version} was installed when this package was built; install 2.11 or newer")
    return Toolchain(cxx, compiler, ninja, folder, version, about["cuda"])


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def _compiler() -> tuple[list[str], str]:
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [[name] for name in ("c++", "g++", "clang++")]
    for command in candidates:
        try:
            ran = subprocess.run([*command, "--version"], capture_output=True, text=True)
        except OSError:
            continue
        if ran.returncode == 0:
            return command, ran.stdout.splitlines()[0]
    if named:
        raise Missing(f"the C++ compiler that CXX named when this package was built does not run: {named}; correct CXX")
    raise Missing("no C++ compiler was found when this package was built; install one, g++ for example")


def _packaged_ninja() -> str | None:
    if importlib.util.find_spec("ninja") is None:
        return None
    import ninja

    return shutil.which("ninja", path=ninja.BIN_DIR)


class BuildNative(build_ext):
    """Write a build.ninja, run ninja, and copy the libraries to their place."""

    def run(self) -> None:
        aside = [kind for kind, variable in ASIDE.items() if _is_set(variable)]
        if aside:
            target = ROOT / "build" / "-".join(aside)
        elif self.inplace or self.editable_mode:
            target = ROOT / PACKAGE
        else:
            target = Path(self.build_lib, PACKAGE)
        target.mkdir(parents=True, exist_ok=True)
        again = "`python setup.py build_ext --inplace`" if target == ROOT / PACKAGE else "the installation"
        try:
            tools = toolchain()
        except Missing as missing:
            if aside or build_cuda.forced():
                raise CompileError(str(missing)) from missing
            reason = f"{missing}, then run {again} again"
            _leave_out("the native kernels", reason, target / FAILURE, target / LIBRARY, target / FACTS)
            _leave_out("the CUDA kernels", reason, target / build_cuda.FAILURE, target / build_cuda.LIBRARY)
            return
        if not CUDA_ALONE.intersection(aside):
            self._build_native(tools, target, aside)
        self._build_cuda(tools, target, aside, again)

    def _build_native(self, tools: Toolchain, target: Path, aside: list[str]) -> None:
        with _folder(tools, "-".join(aside) or "native") as folder:
            plan = build_plan.Plan(tools, folder, aside)
            _run_ninja(tools, folder, plan.ninja())
            _write(ROOT / folder / FACTS, plan.facts())
            for product in (LIBRARY, FACTS):
                _replace(ROOT / folder / product, target / product)
        for stale in target.glob("_build_facts.*.so"):
            stale.unlink()  # of version 0.1, whose facts were a module
        (target / FAILURE).unlink(missing_ok=True)

    def _build_cuda(self, tools: Toolchain, target: Path, aside: list[str], again: str) -> None:
        product, failure = target / build_cuda.LIBRARY, target / build_cuda.FAILURE
        if "emulate-cuda" in aside:
            toolkit = None
        elif "cuda" in aside or (not aside and build_cuda.wanted(tools.torch_cuda)):
            try:
                toolkit = build_cuda.toolkit(tools.torch_cuda)
                build_cuda.try_out(toolkit, tools.cxx)
            except build_cuda.Unavailable as missing:
                if aside or build_cuda.forced():
                    raise CompileError(str(missing)) from missing
                _leave_out("the CUDA kernels", f"{missing}, then run {again} again", failure, product)
                return
        else:
            if not aside:
                product.unlink(missing_ok=True)
                failure.unlink(missing_ok=True)
            return
        with _folder(tools, "-".join(aside) or "cuda") as folder:
            plan = build_plan.CudaPlan(tools, folder, toolkit, aside)
            _write(ROOT / folder / "cuda_facts.h", plan.facts_header())
            _run_ninja(tools, folder, plan.ninja())
            _replace(ROOT / folder / build_cuda.LIBRARY, product)
        failure.unlink(missing_ok=True)

    def get_source_files(self) -> list[str]:
        return [path for kind in ("cpp", "cu", "h", "py") for path in build_plan.sources(f"csrc/**/*.{kind}")]

    def get_outputs(self) -> list[str]:
        if self.inplace or self.editable_mode:
            return []
        names = (LIBRARY, FACTS, FAILURE, build_cuda.LIBRARY, build_cuda.FAILURE)
        paths = [Path(self.build_lib, PACKAGE, name) for name in names]
        return [str(path) for path in paths if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


@contextmanager
def _folder(tools: Toolchain, kind: str) -> Iterator[Path]:
    """Yield the folder of a kind of build, with a lock on it.

    Each torch has a folder of its own, so that changing the torch and changing back compiles nothing again. Two builds
    at once would damage each other's files, so that the second one waits for the lock.
    """
    import fcntl  # Linux has it, and elsewhere no build comes this far

    folder = Path("build", f"{kind}-torch-{tools.torch_version}")
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    with (ROOT / folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _run_ninja(tools: Toolchain, folder: Path, text: str) -> None:
    _write(ROOT / folder / "build.ninja", text)
    command = [tools.ninja, "-f", str(folder / "build.ninja")]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise CompileError("the native kernels do not compile; see the compiler's output above")


def _leave_out(what: str, reason: str, failure: Path, *products: Path) -> None:
    print(f"xsmoe: {what} are not built: {reason}")
    for stale in products:
        stale.unlink(missing_ok=True)
    failure.write_text(reason + "\n", encoding="utf-8")


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _replace(source: Path, target: Path) -> None:
    """Copy a file and replace the target atomically, so that a process that has the old file loaded keeps it."""
    if target.exists() and target.read_bytes() == source.read_bytes():
        return
    aside = target.with_name(f"{target.name}.{os.getpid()}.new")
    shutil.copyfile(source, aside)
    aside.replace(target)


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on one platform: the libraries in it are native, and none uses Python's C API."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # setuptools runs build_ext, and calls the wheel platform-specific, if there is an extension.
    ext_modules=[Extension(f"{PACKAGE}.{Path(LIBRARY).stem}", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
