"""Build, loading and error messages of the native library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.helpers.native_library import ROOT, needs_library
from xsmoe_kernels.backends import cpu as cpu_backend
from xsmoe_kernels.backends import shared_library
from xsmoe_kernels.runtime import dispatch

IMPORT = "import xsmoe_kernels"
FUNCTIONS = {"cpu_tier", "supported_tiers", "cpu_features", "pack_experts"}
"""Functions of the library other than operators."""
SOURCES = ("build_cuda.py", "build_plan.py", "cpu/features.h", "cpu/features.cpp", "cpu/library.cpp")

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the package has no source tree")
needs_compiler = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="there is no C++ compiler")


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with additional environment variables; an empty value removes one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("XSMOE_") and name not in ("CXX", "CXXFLAGS", "LDFLAGS", "LD_PRELOAD")
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | variables,
        capture_output=True,
        text=True,
    )


def build(tree: Path, python: str = sys.executable, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(python, "setup.py", "build_ext", "--inplace", cwd=tree, **variables)


def plant(tree: Path) -> Path:
    """Return a copy of the package with the sources of no operator, which compile in seconds."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in SOURCES:
        (tree / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "csrc" / name, tree / "csrc" / name)
    ignored = shutil.ignore_patterns("*.so", "*.json", cpu_backend.FAILURE, "__pycache__")
    shutil.copytree(ROOT / "xsmoe_kernels", tree / "xsmoe_kernels", ignore=ignored)
    return tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return plant(tmp_path)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a compiler without tile instructions."""
    program = tmp_path_factory.mktemp("compiler") / "c++"
    real = shutil.which("c++") or shutil.which("g++")
    program.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec {real} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, compiler: Path) -> Path:
    """Return a tree with a successful build after one without a compiler."""
    tree = plant(tmp_path_factory.mktemp("built"))
    (tree / "xsmoe_kernels" / cpu_backend.FAILURE).write_text("no C++ compiler was found")
    ran = build(tree, CXX=str(compiler))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return tree


@needs_sources
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/no/such/compiler"}, "CXX named when this package was built does not run: /no/such/compiler"),
        ({"PATH": "/no/such/folder"}, "no C++ compiler was found when this package was built; install one"),
        ({"XSMOE_NO_NATIVE": "1"}, "XSMOE_NO_NATIVE was set when this package was built; unset it"),
    ],
    ids=["CXX", "PATH", "XSMOE_NO_NATIVE"],
)
def test_without_a_compiler_the_package_builds_and_stores_the_reason(
    tree: Path, variables: dict[str, str], reason: str
) -> None:
    stale = tree / "xsmoe_kernels" / cpu_backend.LIBRARY
    stale.touch()
    ran = build(tree, **variables)
    assert ran.returncode == 0, ran.stderr
    assert reason in ran.stdout
    assert not stale.exists()
    kept = (tree / "xsmoe_kernels" / cpu_backend.FAILURE).read_text()
    assert reason in kept
    assert "`python setup.py build_ext --inplace`" in kept


@needs_sources
def test_skipped_kernels_are_reported_at_run_time(tree: Path) -> None:
    assert build(tree, XSMOE_NO_NATIVE="1").returncode == 0
    script = """
import torch, xsmoe_kernels
reason = xsmoe_kernels.info()["native"]["unavailable"]
try:
    with xsmoe_kernels.use_backend("native"):
        pass
except xsmoe_kernels.BackendUnavailable as error:
    assert str(error) == f"backend 'native' cannot run: {reason}", error
print(xsmoe_kernels.info()["operators"]["side_moe"]["cpu"]["unavailable"]["native"])
"""
    ran = run(sys.executable, "-c", script, cwd=tree)
    assert ran.stderr == ""
    assert ran.stdout == (tree / "xsmoe_kernels" / cpu_backend.FAILURE).read_text()


@needs_sources
@needs_compiler
def test_a_second_build_does_nothing(built: Path, compiler: Path) -> None:
    products = [*(built / "xsmoe_kernels").glob("libxsmoe_cpu.*")]
    assert len(products) == 2
    assert not (built / "xsmoe_kernels" / cpu_backend.FAILURE).exists()
    before = [product.stat().st_ctime_ns for product in products]
    ran = build(built, CXX=str(compiler))
    assert "no work to do" in ran.stdout
    assert [product.stat().st_ctime_ns for product in products] == before


@needs_sources
@needs_compiler
def test_sources_are_rebuilt_after_a_header_changes(built: Path) -> None:
    (ninja,) = built.glob("build/native-*/build.ninja")
    program = shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)
    os.utime(built / "csrc/cpu/features.h")
    ran = run(str(program), "-n", "-v", "-f", ninja, cwd=built)
    assert all(f"-c csrc/{source}" in ran.stdout for source in SOURCES if source.endswith(".cpp")), ran.stdout


@needs_sources
@needs_compiler
def test_an_error_in_a_source_fails_the_build(built: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(built, tmp_path / "tree")
    shutil.rmtree(tree / "build")
    (tree / "csrc/wrong").mkdir()
    (tree / "csrc/wrong/cpu_kernels.cpp").write_text("#error this is wrong on purpose\n")
    for source in SOURCES:
        if source.endswith(".cpp"):
            (tree / "csrc" / source).write_text("")
    ran = build(tree)
    assert ran.returncode != 0
    assert "this is wrong on purpose" in ran.stdout
    assert "the native kernels do not compile" in ran.stderr


@needs_sources
@needs_compiler
def test_an_instruction_set_unknown_to_the_compiler_is_skipped(built: Path) -> None:
    script = """
import xsmoe_kernels
native = xsmoe_kernels.info()["native"]
print(native["left_out"], "amx" in native["compiled"], "baseline" in native["tiers"])
"""
    ran = run(sys.executable, "-c", script, cwd=built)
    assert "'amx'] False True" in ran.stdout, ran.stderr
    ran = run(sys.executable, "-c", IMPORT, cwd=built, XSMOE_CPU_TIER="amx")
    assert "not 'amx': this build leaves it out" in ran.stderr


@needs_sources
@needs_compiler
def test_a_build_names_unknown_instruction_sets(tree: Path) -> None:
    ran = build(tree, XSMOE_BUILD_TIERS="baseline sse9")
    assert ran.returncode != 0
    assert "XSMOE_BUILD_TIERS names unknown instruction sets: sse9; known are baseline, avx2" in ran.stderr


@needs_sources
@needs_compiler
def test_an_emulating_build_stays_aside(built: Path) -> None:
    products = [*(built / "xsmoe_kernels").glob("libxsmoe_cpu.*")]
    before = [product.stat().st_ctime_ns for product in products]
    ran = build(built, XSMOE_EMULATE_AMX="1", XSMOE_BUILD_TIERS="baseline")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [product.stat().st_ctime_ns for product in products] == before
    library = built / "build" / "emulate-amx" / cpu_backend.LIBRARY
    script = """
import xsmoe_kernels
native = xsmoe_kernels.info()["native"]
print(*native["compiled"], *native["left_out"], "XSMOE_EMULATE_AMX" in native["flags"])
"""
    ran = run(sys.executable, "-c", script, cwd=built, XSMOE_NATIVE_LIBRARY=str(library))
    assert ran.stdout.split() == ["baseline", "avx2", "avx512", "avx512_bf16", "amx", "True"], ran.stderr


@needs_library
def test_every_kernel_of_the_library_belongs_to_an_operator() -> None:
    held = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("xsmoe_native::")}
    names = {name.removeprefix("xsmoe_native::") for name in held} - FUNCTIONS
    assert names == {operator for operator, kernels in dispatch._kernels.items() if "native" in kernels}


@needs_library
def test_an_instruction_set_that_cannot_run_is_rejected() -> None:
    ran = run(sys.executable, "-c", IMPORT, XSMOE_CPU_TIER="sse9", XSMOE_NATIVE_LIBRARY=str(cpu_backend.library))
    message = r"ImportError: XSMOE_CPU_TIER must be one of the instruction set levels that can run here (baseline"
    assert message in ran.stderr
    assert "not 'sse9': it is not an instruction set level" in ran.stderr


@needs_library
def test_a_library_that_cannot_be_loaded_is_rejected(tmp_path: Path) -> None:
    assert cpu_backend.library is not None
    for path in cpu_backend.library.parent.glob("libxsmoe_cpu.*"):
        shutil.copy(path, tmp_path)
    damaged = tmp_path / cpu_backend.library.name
    damaged.write_bytes(b"no library" * 1000)
    ran = run(sys.executable, "-c", IMPORT, XSMOE_NATIVE_LIBRARY=str(damaged))
    assert f"ImportError: {damaged} cannot be loaded: " in ran.stderr
    built = cpu_backend.describe()["torch"]
    assert f"built against torch {built}" in ran.stderr or built is None
    assert f"torch {torch.__version__} is running. To build it again, run `python setup.py" in ran.stderr


@needs_compiler
def test_a_library_for_another_torch_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "other.cpp").write_text("void of_another_torch(); struct S { S() { of_another_torch(); } } s;")
    ran = run("c++", "-shared", "-fPIC", "other.cpp", "-o", "other.so", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    ran = run(sys.executable, "-c", IMPORT, XSMOE_NATIVE_LIBRARY=str(tmp_path / "other.so"))
    assert "ImportError: " in ran.stderr
    assert "undefined symbol" in ran.stderr
    assert "built against an unknown torch" in ran.stderr


def test_a_missing_library_is_rejected() -> None:
    ran = run(sys.executable, "-c", IMPORT, XSMOE_NATIVE_LIBRARY="/no/such/library.so")
    assert "ImportError: XSMOE_NATIVE_LIBRARY names a file that does not exist: /no/such/library.so" in ran.stderr


def test_the_schema_of_a_kernel_matches_its_operator() -> None:
    library = torch.library.Library("xsmoe_test_native", "DEF")
    library.define("operator(Tensor x, SymInt n, str backend) -> (Tensor a, Tensor b)")
    library.define("kernel(Tensor x, SymInt n) -> (Tensor, Tensor)")
    library.define("fewer(Tensor x) -> (Tensor, Tensor)")
    library.define("swapped(SymInt n, Tensor x) -> (Tensor, Tensor)")
    library.define("other_type(Tensor? x, SymInt n) -> (Tensor, Tensor)")
    library.define("other_result(Tensor x, SymInt n) -> Tensor")
    operators = torch.ops.xsmoe_test_native
    assert shared_library.matches(operators.kernel.default, operators.operator.default)
    for name in ("fewer", "swapped", "other_type", "other_result"):
        assert not shared_library.matches(getattr(operators, name).default, operators.operator.default)


@needs_library
@needs_compiler
def test_one_binary_runs_with_two_versions_of_torch(tmp_path: Path) -> None:
    """A library that one Python builds loads in the other, in both directions."""
    second = os.environ.get("XSMOE_SECOND_PYTHON")
    if not second:
        pytest.skip("XSMOE_SECOND_PYTHON names no Python with another torch")
    script = "import torch, xsmoe_kernels; print(torch.__version__, torch.ops.xsmoe_native.cpu_tier())"
    tier = torch.ops.xsmoe_native.cpu_tier()
    ran = run(second, "-c", script, XSMOE_NATIVE_LIBRARY=str(cpu_backend.library))
    version, found = ran.stdout.split()
    assert version != torch.__version__, "the second Python has the same torch"
    assert found == tier
    tree = plant(tmp_path)
    ran = build(tree, second)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    ran = run(sys.executable, "-c", script, cwd=tree)
    assert ran.stdout.split() == [torch.__version__, tier], ran.stderr
