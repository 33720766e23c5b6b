"""What the package needs, what it ships, and the errors that name an extra."""

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import xsmoe_kernels
from xsmoe.extras import MissingExtra, extra

ROOT = Path(xsmoe_kernels.__file__).parents[1]

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there are no sources next to the package")

# Refuses every import but the standard library, this repository, NumPy, torch and what torch itself requires.
HOOK = """
import sys

ALLOWED = {
    "xsmoe_kernels", "xsmoe", "bench", "numpy",
    "torch", "torchgen", "functorch",
    "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions",
    "setuptools", "pkg_resources", "_distutils_hack", "nvidia",
    *sys.stdlib_module_names,
}


class Only:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        allowed = name.partition(".")[0] in ALLOWED or name.startswith("_sysconfigdata_")
        return self.finder.find_spec(name, path, target) if allowed else None


sys.meta_path[:] = map(Only, sys.meta_path)
for name in [name for name in sys.modules if name.partition(".")[0] not in ALLOWED | {"__main__"}]:
    del sys.modules[name]  # what a file of site-packages imported at start-up
"""

KERNELS = """
import torch, xsmoe_kernels
from xsmoe_kernels import Utilization, side_moe

x, backbone = torch.randn(7, 16, requires_grad=True), torch.randn(7, 16)
router, down, up = (torch.randn(*shape, requires_grad=True) for shape in ((4, 16), (3, 4, 16), (3, 4, 16)))
used = Utilization(3)
side_moe(x, backbone, router, down, up, num_frozen=2, utilization=used).sum().backward()
assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, router, down, up))
assert xsmoe_kernels.info()["versions"]["xsmoe_kernels"] == xsmoe_kernels.__version__
"""

MODULES = """
import torch
from xsmoe.nn import XSMoE

model = XSMoE(modalities=("text", "image"), dim=16, num_levels=2, rank=4, out_dim=8)
optimizer = torch.optim.Adam(model.parameters())
for step in range(2):
    optimizer.zero_grad()
    model({name: torch.randn(9, 3, 16) for name in ("text", "image")}).square().mean().backward()
    optimizer.step()
    model.expand(optimizer=optimizer)
"""

BENCH = """
import runpy
sys.argv = ["bench", "kernels", "side_moe", "--quick", "--sizes", "N=5", "E=2", "D=8", "R=2"]
sys.argv += ["--variants", "naive,eager,ours", "--seconds", "0.02"]
runpy.run_module("bench", run_name="__main__")
"""

TRAINER = """
from importlib import import_module
for name in ("xsmoe.data", "xsmoe.encoders", "xsmoe.stream", "xsmoe.cli"):
    try:
        import_module(name)
    except ImportError as error:
        print(name, type(error).__name__, error)
"""


def python(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that refuses optional packages."""
    command = [sys.executable, *options, "-c", HOOK + script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", [KERNELS, MODULES, BENCH], ids=["xsmoe_kernels", "xsmoe.nn", "bench"])
def test_torch_and_numpy_suffice(script: str) -> None:
    ran = python(script)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_hook_refuses_what_it_should() -> None:
    ran = python("import numpy, json\nimport pyarrow")
    assert ran.returncode == 1
    assert ran.stderr.endswith("ModuleNotFoundError: No module named 'pyarrow'\n")


def test_the_trainer_names_its_extra() -> None:
    ran = python(TRAINER)
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["xsmoe.data", "xsmoe.encoders", "xsmoe.stream", "xsmoe.cli"]
    for line in lines:
        assert re.search(r" MissingExtra the package '\w+' is not installed; run `pip install 'xsmoe\[train\]'`", line)


def test_the_command_line_names_its_extra() -> None:
    ran = python("import runpy; sys.argv = ['xsmoe', 'info']; runpy.run_module('xsmoe', run_name='__main__')")
    assert ran.returncode == 2
    assert ran.stdout == ""
    expected = "xsmoe: error: the package 'typer' is not installed; run `pip install 'xsmoe[train]'`\n"
    assert ran.stderr == expected


def test_saving_a_module_needs_safetensors_and_nothing_before_does() -> None:
    ran = python("from xsmoe.nn import XSMoE\nXSMoE(dim=16, num_levels=2).save_pretrained('never-written')")
    assert ran.stderr.endswith("ModuleNotFoundError: No module named 'safetensors'\n")
    assert not (ROOT / "never-written").exists()


def test_only_packages_that_are_missing_name_an_extra() -> None:
    with pytest.raises(MissingExtra, match=re.escape("run `pip install 'xsmoe[cuda]'`")) as caught, extra("cuda"):
        import no_such_package.part  # noqa: F401
    assert caught.value.name == "no_such_package"
    with pytest.raises(ModuleNotFoundError, match=r"xsmoe\.no_such_module") as own, extra("train"):
        import xsmoe.no_such_module  # noqa: F401
    assert not isinstance(own.value, MissingExtra)


@needs_sources
def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "xsmoe_kernels.runtime.environment.__version__"
    }
    assert xsmoe_kernels.runtime.environment.__version__ == xsmoe_kernels.__version__


@needs_sources
def test_every_extra_can_be_had_from_another() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    own = {name for wants in extras.values() for want in wants for name in re.findall(r"^xsmoe\[(.*)\]", want)}
    assert {name for names in own for name in names.split(",")} <= set(extras)
    code = "".join(path.read_text() for path in ROOT.glob("xsmoe/**/*.py"))
    named = set(re.findall(r'extra\("(\w+)"\)', code))
    assert "train" in named
    assert named <= set(extras)


@needs_sources
def test_the_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    script = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    ran = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (archive,) = tmp_path.iterdir()
    assert archive.name == f"xsmoe-{xsmoe_kernels.__version__}.tar.gz"
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    files = [path for name in ("csrc", "xsmoe", "xsmoe_kernels") for path in (ROOT / name).rglob("*")]
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix in {".cpp", ".cu", ".h", ".py", ".typed"}}
    assert len(wanted) > 200
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= held
    assert not {name for name in held if name.startswith(("tests/", "bench/")) or name.endswith(".so")}


@needs_sources
def test_a_wheel_names_the_oldest_system_that_has_its_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from manylinux import platform_tag

    old = {"GLIBC": (2, 14), "GLIBCXX": (3, 4, 19), "CXXABI": (1, 3)}
    assert platform_tag(old, "x86_64") == "manylinux_2_17_x86_64"
    assert platform_tag(old | {"GLIBCXX": (3, 4, 29)}, "x86_64") == "manylinux_2_34_x86_64"
    assert platform_tag(old | {"GLIBC": (2, 32)}, "aarch64") == "manylinux_2_34_aarch64"
    with pytest.raises(ValueError, match="add a newer one to POLICIES"):
        platform_tag(old | {"GLIBCXX": (3, 4, 99)}, "x86_64")
