"""The build.ninja that setup.py runs: the flags of each source, and the libraries."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import build_cuda
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "libxsmoe_cpu.so"
FACTS = "libxsmoe_cpu.json"
"""How the library next to it was built. A file of its own can be read where the library cannot be loaded."""

COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNELS = [
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-ffp-contract=fast",
    "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
]
OPTIMIZED = ["-O3"]
# -g1 is line numbers only. With -g, compilers take twice as long.
SANITIZERS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EMULATED = "-DXSMOE_EMULATE_AMX"

AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
ISA_LEVELS = {
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


class Toolchain(NamedTuple):
    """The tools to compile with."""

    cxx: list[str]
    compiler: str
    ninja: str
    torch: Path
    torch_version: str
    torch_cuda: str | None


class BuildFile:
    """The text of a build.ninja. Paths of sources are relative to the root, where ninja runs."""

    def __init__(self, tools: Toolchain, folder: Path, aside: list[str]) -> None:
        self.tools, self.folder = tools, folder
        self.sanitize = "sanitize" in aside
        self.extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.linked = shlex.split(os.environ.get("LDFLAGS", ""))
        self.headers = ["-Icsrc", "-isystem", str(tools.torch / "include")]
        self.lines = [f"builddir = {_escape(str(folder))}", f"cxx = {_escape(shlex.join(tools.cxx))}", RULES]

    def compile(self, source: str, flags: list[str], suffix: str = "", rule: str = "compile") -> str:
        """Add a rule that compiles a source; return the name of the object."""
        name = source.removeprefix("csrc/").removesuffix(".cpp").replace("/", ".")
        target = str(self.folder / f"{name}{suffix}.o")
        self.lines += [f"build {_path(target)}: {rule} {_path(source)}", f"  flags = {_escape(shlex.join(flags))}"]
        return target

    def link(self, product: str, objects: list[str], flags: list[str], libraries: list[str]) -> None:
        """Add a rule that links objects."""
        self.lines += [
            f"build {_path(str(self.folder / product))}: link {' '.join(map(_path, objects))}",
            f"  flags = {_escape(shlex.join(flags))}",
            f"  libraries = {_escape(shlex.join(libraries))}",
        ]

    def library(self, product: str, objects: list[str], compiled: list[str], libraries: list[str]) -> None:
        """Add a rule that links a library of operators, whose objects were compiled with these flags."""
        linked = [flag for flag in compiled if flag.startswith("-fsanitize")]
        if not self.sanitize:
            linked.append("-Wl,-z,defs")  # an undefined function is an error here, not when the library is loaded
        torch = ["-L" + str(self.tools.torch / "lib"), "-ltorch_cpu"]
        self.link(product, objects, [*linked, *self.extra], [*torch, *libraries, *self.linked])

    def text(self) -> str:
        """Return the text of the build.ninja."""
        return "\n".join(self.lines) + "\n"


class Plan(BuildFile):
    """The build of the kernels for CPUs."""

    def __init__(self, tools: Toolchain, folder: Path, aside: list[str]) -> None:
        super().__init__(tools, folder, aside)
        self.isa_levels = _isa_levels(tools.cxx)
        # GCC warns of the uninitialized values in its own intrinsics.
        self.quiet = [flag for flag in ("-Wno-maybe-uninitialized",) if accepts(tools.cxx, [flag])]
        self.common = [*COMMON, *([EMULATED] if "emulate-amx" in aside else [])]
        self.flags = [*self.common, *KERNELS, *(SANITIZERS if self.sanitize else OPTIMIZED)]

    def facts(self) -> str:
        """Return the facts of the build, as JSON."""
        facts = {
            "compiler": self.tools.compiler,
            "flags": shlex.join([*self.flags, *self.extra]),
            "torch": self.tools.torch_version,
            "tiers": {name: shlex.join(flags) for name, flags in self.isa_levels.items()},
            "left_out": [name for name in ISA_LEVELS if name not in self.isa_levels],
        }
        return json.dumps(facts, indent=2) + "\n"

    def ninja(self) -> str:
        levels = "XSMOE_ISA_LEVELS(X)=" + " ".join(f"X({name})" for name in self.isa_levels)
        flags = [*self.flags, "-D" + levels, *self.headers]
        objects = [
            self.compile(source, [*flags, *self.extra])
            for source in ("csrc/cpu/features.cpp", "csrc/cpu/library.cpp", *sources("csrc/*/cpu.cpp"))
        ]
        objects += [
            self.compile(source, [*flags, *self.quiet, *level_flags, f"-DXSMOE_ISA={level}", *self.extra], "." + level)
            for source in sources("csrc/*/cpu_kernels.cpp")
            for level, level_flags in self.isa_levels.items()
        ]
        self.library(LIBRARY, objects, self.flags, [])
        return self.text()


class CudaPlan(BuildFile):
    """The build of the CUDA kernels. Without a toolkit, they are compiled for the emulation on a CPU."""

    def __init__(self, tools: Toolchain, folder: Path, toolkit: build_cuda.Toolkit | None, aside: list[str]) -> None:
        super().__init__(tools, folder, aside)
        self.toolkit = toolkit
        emulated = [] if toolkit else [build_cuda.EMULATED]
        self.flags = [*COMMON, *KERNELS, *(SANITIZERS if self.sanitize else OPTIMIZED), *emulated]

    def facts_header(self) -> str:
        """Return the header with the facts that `xsmoe_cuda::build` returns."""
        return _header("cuda_facts", build_cuda.facts(self.toolkit, self.tools.compiler, self.tools.torch_version))

    def ninja(self) -> str:
        """Return the text of the build.ninja."""
        flags, libraries = [*self.flags, *self.headers, "-I" + str(self.folder)], []
        operators = [*sources("csrc/cuda/*.cpp"), *sources("csrc/*/cuda.cpp")]
        kernels = sources("csrc/*/cuda.cu")
        if self.toolkit is None:
            objects = [self.compile(source, ["-xc++", *flags, *self.extra]) for source in kernels]
        else:
            operators.remove("csrc/cuda/emulated.cpp")
            flags += ["-isystem", str(self.toolkit.root / "include")]
            libraries = build_cuda.link_flags(self.toolkit)
            self.lines += [f"nvcc = {_escape(shlex.quote(self.toolkit.nvcc))}", build_cuda.RULE]
            nvcc = [*build_cuda.compile_flags(self.toolkit), *build_cuda.host_compiler(self.tools.cxx), "-Icsrc"]
            objects = [self.compile(source, nvcc, rule="nvcc") for source in kernels]
        objects += [self.compile(source, [*flags, *self.extra]) for source in operators]
        self.library(build_cuda.LIBRARY, objects, self.flags, libraries)
        return self.text()


def _isa_levels(cxx: list[str]) -> dict[str, list[str]]:
    """Return the instruction set levels to compile, and their flags."""
    named = os.environ.get("XSMOE_BUILD_TIERS", "").split() or [*ISA_LEVELS]
    if unknown := sorted(set(named) - set(ISA_LEVELS)):
        raise CompileError(
            f"XSMOE_BUILD_TIERS names unknown instruction sets: {', '.join(unknown)}; known are {', '.join(ISA_LEVELS)}"
        )
    return {name: flags for name, flags in ISA_LEVELS.items() if name in named and accepts(cxx, flags)}


def _header(namespace: str, facts: dict[str, object]) -> str:
    # JSON's escapes of plain text are those of C++.
    return f"namespace {namespace} {{\nconstexpr char json[] = {json.dumps(json.dumps(facts))};\n}}\n"


def sources(pattern: str) -> list[str]:
    """Return the files that match a pattern, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def accepts(cxx: list[str], flags: list[str], source: str = "") -> bool:
    """Return whether a compiler accepts the flags, and compiles the source with them."""
    command = [*cxx, *flags, "-Werror", "-fsyntax-only", "-x", "c++", "-"]
    return not flags or subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _path(text: str) -> str:
    return _escape(text).replace(" ", "$ ").replace(":", "$:")
