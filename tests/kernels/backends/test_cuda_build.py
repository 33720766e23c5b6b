"""The CUDA kernels compile and link with nvcc, within their budget; and messages where they cannot.

`python -m tests.kernels.helpers.cuda_offline --write` writes cuda_budget.json, the limits of each kernel. Its
numbers are those of one version of nvcc. Another version may use more registers, but must not spill either.
"""

import json
import os
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels.helpers import cuda_offline
from tests.kernels.helpers.cuda_offline import BUDGET, Found
from tests.kernels.helpers.native_library import ROOT, run_python
from xsmoe_kernels.backends import cuda as cuda_backend
from xsmoe_kernels.backends import shared_library

sys.path.insert(0, str(ROOT / "csrc"))
build_cuda: ModuleType = pytest.importorskip("build_cuda", reason="the package has no source tree")


def _no_toolkit() -> str | None:
    try:
        build_cuda.toolkit(None)
    except build_cuda.Unavailable as missing:
        return str(missing)
    return None


needs_nvcc = pytest.mark.skipif(_no_toolkit() is not None, reason=_no_toolkit() or "")
LIBRARY = ROOT / "build" / "cuda" / cuda_backend.LIBRARY


SOME = ("8.0", "9.0+PTX")
"""The oldest GPU and the main one. Each compilation needs half a minute of a core; test-all compiles for the others."""


@pytest.fixture(scope="module")
def found() -> list[Found]:
    return cuda_offline.measure(";".join(SOME))


@needs_nvcc
def test_all_kernels_compile_and_spill_nothing(found: list[Found]) -> None:
    sources = {path.parent.name for path in ROOT.glob("csrc/*/cuda.cu")}
    assert sources == {path.name.split(".")[0] for path in cuda_offline.logs()}
    assert_nothing_spills(found, SOME)


@needs_nvcc
@pytest.mark.slow
def test_all_kernels_compile_for_all_gpus_within_their_budget() -> None:
    found = cuda_offline.measure()
    assert_nothing_spills(found, build_cuda.toolkit(None).architectures)
    assert_within_budget(found)


def assert_nothing_spills(found: list[Found], asked: tuple[str, ...]) -> None:
    architectures = {one.removesuffix("+PTX").replace(".", "") for one in asked}
    by_kernel: dict[str, set[str]] = {}
    for one in found:
        by_kernel.setdefault(one.kernel, set()).add(one.architecture.removeprefix("sm_"))
    assert by_kernel
    assert set(map(frozenset, by_kernel.values())) == {frozenset(architectures)}
    # A stack frame is an array with run-time indices: it is in memory, like spilled registers.
    assert not [one for one in found if one.spilled or one.stack or one.registers > 255]
    # The launchers choose the size of shared memory, which tests of their geometry check.
    assert not [one for one in found if one.shared]


@needs_nvcc
def test_kernels_keep_to_their_budget(found: list[Found]) -> None:
    assert_within_budget(found)


def assert_within_budget(found: list[Found]) -> None:
    budget = json.loads(BUDGET.read_text())
    asked = cuda_offline.as_budget(found, cuda_offline.nvcc_version())
    assert set(asked["registers"]) == set(budget["registers"]), "write the budget again"
    if asked["nvcc"] != budget["nvcc"]:
        pytest.skip(f"the budget is that of nvcc {budget['nvcc']}")
    beyond = {
        (name, architecture): registers
        for name, of in asked["registers"].items()
        for architecture, registers in of.items()
        if registers > budget["registers"][name][architecture]
    }
    assert not beyond


def test_parses_the_output_of_ptxas() -> None:
    said = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5xsmoe4rank3oneEv' for 'sm_90'
ptxas info    : Function properties for _ZN5xsmoe4rank3oneEv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN5xsmoe4rank3twoIfLi4EEEvv' for 'sm_100a'
ptxas info    : Function properties for _ZN5xsmoe4rank3twoIfLi4EEEvv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers
"""
    assert cuda_offline.parse(said) == [
        Found("rank::one", "sm_90", 40, 8, 16, 2048),
        Found("rank::two<float, 4>", "sm_100a", 12, 0, 0, 0),
    ]


@needs_nvcc
@pytest.mark.usefixtures("found")
def test_the_library_loads_without_a_gpu_and_has_the_operators() -> None:
    program = "import json, xsmoe_kernels as x; print(json.dumps(x.info()['cuda_kernels']))"
    facts = json.loads(run_python("-c", program, XSMOE_CUDA_LIBRARY=str(LIBRARY)))
    assert facts["library"] == str(LIBRARY)
    assert facts["emulated"] is False
    # All of them, where a test before this one has built for all.
    assert {one.removesuffix("+PTX") for one in SOME} <= {one.removesuffix("+PTX") for one in facts["architectures"]}
    assert facts["compiler"].startswith("nvcc ")


@needs_nvcc
@pytest.mark.usefixtures("found")
def test_it_does_not_run_on_a_cpu() -> None:
    program = (
        "import torch, xsmoe_kernels as x\n"
        "try:\n"
        "    with x.use_backend('cuda'): x.route_topk(torch.zeros(2, 3), 1)\n"
        "except x.BackendUnavailable as error: print(error)"
    )
    said = run_python("-c", program, XSMOE_CUDA_LIBRARY=str(LIBRARY))
    assert "the cuda kernels run on cuda only, not on cpu" in said


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a stand-in for nvcc that prints given messages and compiles nothing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    program = tmp_path / "bin" / "nvcc"
    pretend(program)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return program


def pretend(program: Path, release: str = "13.0", known: str = "75 80 86 89 90 100 120") -> None:
    listed = "\\n".join(f"compute_{one}" for one in known.split())
    program.write_text(
        "#!/bin/sh\n"
        f'case $1 in --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;\n'
        f'--list-gpu-arch) printf "{listed}\\n" ;;\n'
        f'--dryrun) echo "#$ TOP={program.parents[1]}/bin/.." >&2 ;; esac\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)


def test_compiles_for_known_gpus_and_ptx_for_newer_ones(nvcc: Path) -> None:
    tools = build_cuda.toolkit("13.0")
    assert tools.architectures == ("8.0", "8.6", "8.9", "9.0", "10.0+PTX")
    assert tools.version == "13.0"
    assert tools.root == nvcc.parents[1]
    assert tools.targets()[-2:] == [
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    pretend(nvcc, "12.4", "50 80 86 89 90")
    assert build_cuda.toolkit("12.6").architectures == ("8.0", "8.6", "8.9", "9.0+PTX")


@pytest.mark.parametrize(
    ("asked", "architectures"),
    [
        ("9.0", ("9.0",)),
        ("8.0;9.0+PTX", ("8.0", "9.0+PTX")),
        ("8.6 9.0a, 8.6", ("8.6", "9.0a")),
        ("7.5;8.0", ("8.0",)),
        (" ", None),
    ],
)
def test_torchs_variable_names_the_gpus(
    nvcc: Path, asked: str, architectures: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    usual = ("8.0", "8.6", "8.9", "9.0", "10.0+PTX")
    assert build_cuda.toolkit("13.0").architectures == (architectures or usual)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("Hopper", "TORCH_CUDA_ARCH_LIST names 'Hopper', which is not a version such as 9.0"),
        ("7.0;7.5+PTX", r"TORCH_CUDA_ARCH_LIST names 7.0, 7.5\+PTX; the CUDA kernels need 8.0 or newer"),
        ("9.0;11.5", r"TORCH_CUDA_ARCH_LIST names 11.5, which .*nvcc does not compile for"),
    ],
)
def test_gpus_that_cannot_be_compiled_for_are_named(
    nvcc: Path, asked: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(build_cuda.Unavailable, match=message):
        build_cuda.toolkit("13.0")


def test_a_toolkit_that_does_not_fit_is_named(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build_cuda.Unavailable, match=r"nvcc is of CUDA 13.0 and torch of CUDA 12.8; name a toolkit"):
        build_cuda.toolkit("12.8")
    pretend(nvcc, "11.8")
    with pytest.raises(build_cuda.Unavailable, match=r"nvcc 11.8 is too old; name a toolkit of CUDA 12 or newer"):
        build_cuda.toolkit(None)
    (nvcc.parents[1] / "include" / "cuda_runtime.h").unlink()
    pretend(nvcc)
    with pytest.raises(build_cuda.Unavailable, match=r"has no include/cuda_runtime.h; install the whole"):
        build_cuda.toolkit(None)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent))
    with pytest.raises(build_cuda.Unavailable, match=r"nvcc was not found in .*bin/bin/nvcc, where CUDA_HOME points"):
        build_cuda.toolkit(None)


def test_a_compiler_that_the_toolkit_rejects_is_named(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = build_cuda.toolkit("13.0")
    build_cuda.try_out(tools, ["g++"])
    assert build_cuda.host_compiler(["/usr/bin/ccache", "g++", "-m64"]) == ["-ccbin", "g++"]
    nvcc.write_text("#!/bin/sh\necho '#error -- unsupported GNU version! gcc versions later than 14' >&2\nexit 1\n")
    with pytest.raises(build_cuda.Unavailable, match=r"does not compile with g\+\+: #error -- unsupported GNU version"):
        build_cuda.try_out(tools, ["g++"])
    monkeypatch.setenv("XSMOE_NO_CUDA", "1")
    with pytest.raises(build_cuda.Unavailable, match="XSMOE_NO_CUDA was set"):
        build_cuda.toolkit("13.0")


def test_is_built_where_torch_has_cuda_or_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, forced in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("FORCE_CUDA", value)
        assert build_cuda.wanted(None) == build_cuda.forced() == forced
        assert build_cuda.wanted("13.0")


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((9, 0), ("9.0",), True),
        ((9, 0), ("8.0",), False),
        ((8, 6), ("8.0",), True),
        ((8, 0), ("8.6",), False),
        ((12, 0), ("8.0", "10.0"), False),
        ((12, 0), ("8.0", "10.0+PTX"), True),
        ((9, 0), ("9.0a",), True),
        ((10, 0), ("9.0a+PTX",), False),
        ((10, 3), ("10.0",), True),
        ((10, 3), ("10.0f",), True),
        ((12, 0), ("10.0f+PTX",), False),
    ],
)
def test_runs_on_compatible_gpus_only(capability: tuple[int, int], compiled: tuple[str, ...], runs: bool) -> None:
    assert cuda_backend._runs_on(capability, compiled) == runs


def test_a_gpu_that_it_was_not_compiled_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    said = cuda_backend._rejects(("9.0",), None, torch.device("cuda", 0), torch.float32)
    assert said is not None
    assert "were compiled for 9.0, and cuda:0 has 8.0; build them again with that in TORCH_CUDA_ARCH_LIST" in said
    assert cuda_backend._rejects(("8.0", "9.0"), None, torch.device("cuda", 0), torch.float32) is None


def test_reports_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_library, "FOLDER", tmp_path / "xsmoe_kernels")
    (tmp_path / "xsmoe_kernels").mkdir()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_backend._missing_reason() == "torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert (cuda_backend._missing_reason() or "").startswith("the CUDA kernels are not built: install xsmoe again")
    (tmp_path / "xsmoe_kernels" / cuda_backend.FAILURE).write_text("nvcc was not found\n")
    assert cuda_backend._missing_reason() == "nvcc was not found"


def test_names_a_library_that_is_not_there() -> None:
    program = "import xsmoe_kernels"
    with pytest.raises(AssertionError, match="XSMOE_CUDA_LIBRARY names a file that does not exist: nowhere.so"):
        run_python("-c", program, XSMOE_CUDA_LIBRARY="nowhere.so")


def test_forced_without_a_toolkit_is_an_error(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XSMOE_")}
    with pytest.raises(AssertionError, match="nvcc was not found in .*, where CUDA_HOME points"):
        run_python(
            "setup.py", "-q", "build_ext", "--inplace", FORCE_CUDA="1", CUDA_HOME=str(tmp_path), PATH=kept["PATH"]
        )


def test_a_failed_allocation_is_out_of_memory() -> None:
    def fails(said: str) -> None:
        raise RuntimeError(said)

    kernel = cuda_backend._with_out_of_memory_error("route_topk", fails)
    with pytest.raises(torch.OutOfMemoryError, match="the cuda kernels of route_topk could not allocate"):
        kernel('torch_call_dispatcher( "aten::new_empty", "", stack) API call failed')
    with pytest.raises(RuntimeError, match=r"^route_kernel: too many resources requested$") as other:
        kernel("route_kernel: too many resources requested")
    assert not isinstance(other.value, torch.OutOfMemoryError)
