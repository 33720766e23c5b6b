"""Build of the native CPU extension. The project's metadata lies in pyproject.toml.

    python setup.py build_ext --inplace

compiles csrc/ with ninja into files of xsmoe_kernels: libxsmoe_cpu.so, the operators for CPUs, _build_facts, a module
that tells how they were built, and libxsmoe_cuda.so, CUDA kernels for GPUs, if torch has CUDA. Where something is
missing that compiling takes (a C++ compiler, ninja, torch, nvcc) the package still installs, and the reason is kept in
xsmoe_kernels/_build_failure.txt or _cuda_build_failure.txt for `xsmoe_kernels.info()`. Errors in the sources fail the
build.

Variables: CXX, CXXFLAGS and LDFLAGS as ever; MAX_JOBS bounds the compilers that run at once; XSMOE_NO_NATIVE=1 leaves
native code out. For CUDA, which a GPU need not be there for: CUDA_HOME names the toolkit; TORCH_CUDA_ARCH_LIST, such as
"8.0;9.0+PTX", the GPUs; FORCE_CUDA=1 builds the kernels for a torch without CUDA too, and fails where it cannot. For
tests, which build aside into build/<name> and leave the package as it is:

    XSMOE_SANITIZE=1        build/sanitize, with AddressSanitizer and UndefinedBehaviorSanitizer
    XSMOE_EMULATE_AMX=1     build/emulate-amx, whose amx tier runs wherever avx512_bf16 does, on tiles that
                            csrc/cpu/amx.h emulates; with both variables, build/sanitize-emulate-amx
    XSMOE_BUILD_TIERS       the tiers to compile, such as "baseline amx", instead of all; the others count as left out
    XSMOE_CUDA_ASIDE=1      build/cuda, libxsmoe_cuda.so alone
    XSMOE_EMULATE_CUDA=1    build/emulate-cuda, libxsmoe_cuda.so alone, for a CPU, whose threads csrc/cuda/emulated.cpp
                            emulates; with XSMOE_SANITIZE, build/sanitize-emulate-cuda
"""

import importlib.util
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402

PACKAGE = "xsmoe_kernels"
LIBRARY = "libxsmoe_cpu.so"
FACTS = "_build_facts"
FAILURE = "_build_failure.txt"
ASIDE = {
    "sanitize": "XSMOE_SANITIZE",
    "emulate-amx": "XSMOE_EMULATE_AMX",
    "cuda": "XSMOE_CUDA_ASIDE",
    "emulate-cuda": "XSMOE_EMULATE_CUDA",
}
"""The kinds of build that stay out of the package, and the variables that ask for them."""
CUDA_ALONE = {"cuda", "emulate-cuda"}
"""The kinds that have no kernels for CPUs."""

MINIMUM_TORCH = (2, 11)
# What of the sources older compilers refuse: their errors would look like faults of ours.
MODERN = """
typedef int Quad __attribute__((vector_size(16)));
Quad reversed(Quad a) { return __builtin_shufflevector(a, a, 3, 2, 1, 0); }
struct Two { int a, b; };
int sum(Two two) { const auto [a, b] = two; return [&] { return a + b; }(); }
"""
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNELS = [
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-ffp-contract=fast",
    "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
]
OPTIMIZED = ["-O3"]
# Line numbers alone: all of -g makes compilers half as fast.
SANITIZERS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EMULATED = "-DXSMOE_EMULATE_AMX"

AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
TIERS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}

RULES = """\
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = $cxx $flags -shared $in -o $out $libraries
  description = link $out
"""


class Missing(Exception):
    """What the build lacks, and what to do about it."""


class Toolchain(NamedTuple):
    """All that compiling takes."""

    cxx: list[str]
    compiler: str
    ninja: str
    torch: Path
    torch_version: str
    torch_cuda: str | None


def toolchain() -> Toolchain:
    """What is there to compile with; raises Missing."""
    if _is_set("XSMOE_NO_NATIVE"):
        raise Missing("XSMOE_NO_NATIVE was set when this package was built; unset it")
    if not sys.platform.startswith("linux"):
        raise Missing(f"native kernels are built on Linux only so far, not on {sys.platform}")
    cxx, compiler = _compiler()
    if not _accepts(cxx, ["-std=c++20"], MODERN):
        raise Missing(f"{compiler} is too old: it takes g++ 12 or clang 16; install one and name it in CXX")
    ninja = shutil.which("ninja") or _packaged_ninja()
    if ninja is None:
        raise Missing("ninja was not found when this package was built; `pip install ninja`")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise Missing("torch was not installed when this package was built; install torch and use --no-build-isolation")
    folder = Path(torch.origin).parent
    # The file alone: importing torch takes seconds, and a build that has nothing to do should take none.
    about = runpy.run_path(str(folder / "version.py"))
    version = str(about["__version__"])
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        raise Missing(f"torch {version} was installed when this package was built; it takes 2.11 or newer")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise Missing("Python's C headers were not found when this package was built; install python3-dev or its like")
    return Toolchain(cxx, compiler, ninja, folder, version, about["cuda"])


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def _tiers(cxx: list[str]) -> dict[str, list[str]]:
    """The tiers to compile, and their flags."""
    named = os.environ.get("XSMOE_BUILD_TIERS", "").split() or [*TIERS]
    if unknown := sorted(set(named) - set(TIERS)):
        raise CompileError(f"XSMOE_BUILD_TIERS names no tiers: {', '.join(unknown)}; there are {', '.join(TIERS)}")
    return {name: flags for name, flags in TIERS.items() if name in named and _accepts(cxx, flags)}


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
    """Writes a build.ninja, runs it, and puts what it made where it belongs."""

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
            products = (target / LIBRARY, *target.glob(f"{FACTS}.*.so"))
            _leave_out("the native kernels", f"{missing}, then run {again} again", target / FAILURE, *products)
            return
        if not CUDA_ALONE.intersection(aside):
            self._build_native(tools, target, aside)
        self._build_cuda(tools, target, aside, again)

    def _build_native(self, tools: Toolchain, target: Path, aside: list[str]) -> None:
        facts = FACTS + sysconfig.get_config_var("EXT_SUFFIX")
        with _folder(tools, "-".join(aside) or "native") as folder:
            plan = Plan(tools, folder, facts, aside)
            _write(ROOT / folder / "facts.h", plan.facts_header())
            _run_ninja(tools, folder, plan.ninja())
        for stale in set(target.glob(f"{FACTS}.*.so")) - {target / facts}:
            stale.unlink()  # of a library that is replaced now
        for product in (LIBRARY, facts):
            _replace(ROOT / folder / product, target / product)
        (target / FAILURE).unlink(missing_ok=True)

    def _build_cuda(self, tools: Toolchain, target: Path, aside: list[str], again: str) -> None:
        product, failure = target / build_cuda.LIBRARY, target / build_cuda.FAILURE
        if "emulate-cuda" in aside:
            toolkit = None
        elif "cuda" in aside or (not aside and build_cuda.wanted(tools.torch_cuda)):
            try:
                toolkit = build_cuda.toolkit(tools.torch_cuda)
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
            plan = CudaPlan(tools, folder, toolkit, aside)
            _write(ROOT / folder / "cuda_facts.h", plan.facts_header())
            _run_ninja(tools, folder, plan.ninja())
        _replace(ROOT / folder / build_cuda.LIBRARY, product)
        failure.unlink(missing_ok=True)

    def get_source_files(self) -> list[str]:
        return [path for kind in ("cpp", "cu", "h", "py") for path in _sources(f"csrc/**/*.{kind}")]

    def get_outputs(self) -> list[str]:
        if self.inplace or self.editable_mode:
            return []
        facts = FACTS + sysconfig.get_config_var("EXT_SUFFIX")
        names = (LIBRARY, facts, FAILURE, build_cuda.LIBRARY, build_cuda.FAILURE)
        paths = [Path(self.build_lib, PACKAGE, name) for name in names]
        return [str(path) for path in paths if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildFile:
    """A build.ninja in the making; sources are named from the root, where ninja runs."""

    def __init__(self, tools: Toolchain, folder: Path, aside: list[str]) -> None:
        self.tools, self.folder = tools, folder
        self.sanitize = "sanitize" in aside
        self.extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.linked = shlex.split(os.environ.get("LDFLAGS", ""))
        self.headers = ["-Icsrc", "-isystem", str(tools.torch / "include")]
        self.lines = [f"builddir = {_escape(str(folder))}", f"cxx = {_escape(shlex.join(tools.cxx))}", RULES]

    def compile(self, source: str, flags: list[str], suffix: str = "", rule: str = "compile") -> str:
        """Has a source compiled; the object's name."""
        name = source.removeprefix("csrc/").removesuffix(".cpp").replace("/", ".")
        target = str(self.folder / f"{name}{suffix}.o")
        self.lines += [f"build {_path(target)}: {rule} {_path(source)}", f"  flags = {_escape(shlex.join(flags))}"]
        return target

    def link(self, product: str, objects: list[str], flags: list[str], libraries: list[str]) -> None:
        """Has objects linked."""
        self.lines += [
            f"build {_path(str(self.folder / product))}: link {' '.join(map(_path, objects))}",
            f"  flags = {_escape(shlex.join(flags))}",
            f"  libraries = {_escape(shlex.join(libraries))}",
        ]

    def library(self, product: str, objects: list[str], compiled: list[str], libraries: list[str]) -> None:
        """Has a library of operators linked, whose objects were compiled with these flags."""
        linked = [flag for flag in compiled if flag.startswith("-fsanitize")]
        if not self.sanitize:
            linked.append("-Wl,-z,defs")  # a function that nobody defines fails here, not when the library is loaded
        torch = ["-L" + str(self.tools.torch / "lib"), "-ltorch_cpu"]
        self.link(product, objects, [*linked, *self.extra], [*torch, *libraries, *self.linked])

    def text(self) -> str:
        """What ninja reads."""
        return "\n".join(self.lines) + "\n"


class Plan(BuildFile):
    """Which file of the kernels for CPUs is compiled with what."""

    def __init__(self, tools: Toolchain, folder: Path, facts: str, aside: list[str]) -> None:
        super().__init__(tools, folder, aside)
        self.facts = facts
        self.tiers = _tiers(tools.cxx)
        # Of its own intrinsics, for the values that these leave open, GCC warns by the hundred.
        self.quiet = [flag for flag in ("-Wno-maybe-uninitialized",) if _accepts(tools.cxx, [flag])]
        self.common = [*COMMON, *([EMULATED] if "emulate-amx" in aside else [])]
        self.flags = [*self.common, *KERNELS, *(SANITIZERS if self.sanitize else OPTIMIZED)]

    def facts_header(self) -> str:
        facts = {
            "compiler": self.tools.compiler,
            "flags": shlex.join([*self.flags, *self.extra]),
            "torch": self.tools.torch_version,
            "tiers": {name: shlex.join(flags) for name, flags in self.tiers.items()},
            "left_out": [name for name in TIERS if name not in self.tiers],
        }
        return _header("facts", facts)

    def ninja(self) -> str:
        tiers = "XSMOE_TIERS(X)=" + " ".join(f"X({name})" for name in self.tiers)
        flags = [*self.flags, "-D" + tiers, *self.headers]
        objects = [
            self.compile(source, [*flags, *self.extra])
            for source in ("csrc/cpu/features.cpp", "csrc/cpu/library.cpp", *_sources("csrc/*/cpu.cpp"))
        ]
        objects += [
            self.compile(source, [*flags, *self.quiet, *tier_flags, f"-DXSMOE_TIER={tier}", *self.extra], "." + tier)
            for source in _sources("csrc/*/cpu_kernels.cpp")
            for tier, tier_flags in self.tiers.items()
        ]
        self.library(LIBRARY, objects, self.flags, [])
        # Nothing here is worth a wait: no optimization, no sanitizer. pybind11 comes with torch's headers.
        plain = [
            *self.common,
            "-D" + tiers,
            *self.headers,
            "-I" + str(self.folder),
            "-I" + sysconfig.get_path("include"),
        ]
        modules = [self.compile(f"csrc/{name}.cpp", plain, ".facts") for name in ("build_facts", "cpu/features")]
        self.link(self.facts, modules, [], [])
        return self.text()


class CudaPlan(BuildFile):
    """Which file of the CUDA kernels is compiled with what; without a toolkit all are compiled for a CPU."""

    def __init__(self, tools: Toolchain, folder: Path, toolkit: build_cuda.Toolkit | None, aside: list[str]) -> None:
        super().__init__(tools, folder, aside)
        self.toolkit = toolkit
        emulated = [] if toolkit else [build_cuda.EMULATED]
        self.flags = [*COMMON, *KERNELS, *(SANITIZERS if self.sanitize else OPTIMIZED), *emulated]

    def facts_header(self) -> str:
        """What `xsmoe_cuda::build` tells."""
        return _header("cuda_facts", build_cuda.facts(self.toolkit, self.tools.compiler, self.tools.torch_version))

    def ninja(self) -> str:
        """What ninja reads."""
        flags, libraries = [*self.flags, *self.headers, "-I" + str(self.folder)], []
        operators = [*_sources("csrc/cuda/*.cpp"), *_sources("csrc/*/cuda.cpp")]
        kernels = _sources("csrc/*/cuda.cu")
        if self.toolkit is None:
            objects = [self.compile(source, ["-xc++", *flags, *self.extra]) for source in kernels]
        else:
            operators.remove("csrc/cuda/emulated.cpp")
            flags += ["-isystem", str(self.toolkit.root / "include")]
            libraries = build_cuda.link_flags(self.toolkit)
            self.lines += [f"nvcc = {_escape(shlex.quote(self.toolkit.nvcc))}", build_cuda.RULE]
            nvcc = [*build_cuda.compile_flags(self.toolkit), "-ccbin", self.tools.cxx[0], "-Icsrc"]
            objects = [self.compile(source, nvcc, rule="nvcc") for source in kernels]
        objects += [self.compile(source, [*flags, *self.extra]) for source in operators]
        self.library(build_cuda.LIBRARY, objects, self.flags, libraries)
        return self.text()


@contextmanager
def _folder(tools: Toolchain, kind: str) -> Iterator[Path]:
    """The folder of a kind of build, of its own for each Python and torch, so that going from one to the other and back
    compiles nothing anew. Waits until no other build works in it: two at once would spoil each other's files."""
    import fcntl  # Linux has it, and elsewhere no build comes this far

    folder = Path("build", f"{kind}-{sys.implementation.cache_tag}-torch-{tools.torch_version}")
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
        raise CompileError("the native kernels do not compile; what the compiler said stands above")


def _leave_out(what: str, reason: str, failure: Path, *products: Path) -> None:
    print(f"xsmoe: {what} are left out: {reason}")
    for stale in products:
        stale.unlink(missing_ok=True)
    failure.write_text(reason + "\n", encoding="utf-8")


def _header(namespace: str, facts: dict[str, object]) -> str:
    # JSON's escapes of plain text are those of C++.
    return f"namespace {namespace} {{\nconstexpr char json[] = {json.dumps(json.dumps(facts))};\n}}\n"


def _sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def _accepts(cxx: list[str], flags: list[str], source: str = "") -> bool:
    command = [*cxx, *flags, "-Werror", "-fsyntax-only", "-x", "c++", "-"]
    return not flags or subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _path(text: str) -> str:
    return _escape(text).replace(" ", "$ ").replace(":", "$:")


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _replace(source: Path, target: Path) -> None:
    """Copies a file in one step: a process that has the old one loaded keeps it whole."""
    if target.exists() and target.read_bytes() == source.read_bytes():
        return
    aside = target.with_name(target.name + ".new")
    shutil.copyfile(source, aside)
    aside.replace(target)


setup(
    ext_modules=[Extension(f"{PACKAGE}.{FACTS}", ["csrc/build_facts.cpp"])],
    cmdclass={"build_ext": BuildNative},
)
