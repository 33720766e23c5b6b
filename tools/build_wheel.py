"""Build a source distribution and a CPU wheel, and try the wheel where there is no compiler: `make wheel`.

    python tools/build_wheel.py [--out dist]

The wheel is built from the source distribution. Its tag is py3-none-<platform>: one wheel serves every Python from 3.11
on, because the library in it uses LibTorch's stable ABI and nothing of Python. The platform comes from the versions of
the symbols that the library needs. A fresh virtual environment then installs the wheel, and runs tools/smoke_test.py.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from manylinux import needed_versions, platform_tag

ROOT = Path(__file__).resolve().parents[1]
SDIST = "from setuptools.build_meta import build_sdist; import sys; print(build_sdist(sys.argv[1]))"


def main() -> int:
    """Build, install and try. Return the exit code."""
    parser = argparse.ArgumentParser(description="Build a source distribution and a CPU wheel, and try the wheel.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for both files (default: dist)")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("xsmoe-*.tar.gz"), *out.glob("xsmoe-*.whl")):
        old.unlink()
    sdist = build_sdist(out)
    wheel = build_wheel(sdist, out)
    with tempfile.TemporaryDirectory() as folder:
        smoke_test(wheel, Path(folder))
    print(f"\nsource distribution: {sdist}\nwheel: {wheel} ({wheel.stat().st_size / 2**20:.1f} MiB)")
    return 0


def build_sdist(out: Path) -> Path:
    """Build the source distribution, and return its path."""
    name = _run(sys.executable, "-c", SDIST, out, capture=True).splitlines()[-1]
    return out / name


def build_wheel(sdist: Path, out: Path) -> Path:
    """Build the wheel from a source distribution, tag it for the systems that can load it, and return its path."""
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-cache-dir")
    _run(*command, "--wheel-dir", out, sdist, environment={**os.environ, "XSMOE_NO_CUDA": "1"})
    (wheel,) = out.glob("xsmoe-*.whl")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as packed:
        libraries = [Path(packed.extract(name, folder)) for name in packed.namelist() if name.endswith(".so")]
        if not libraries:
            raise SystemExit(f"{wheel} holds no native library; the output above has the reason")
        needed = needed_versions(libraries)
    print("the library needs " + ", ".join(f"{name}_{'.'.join(map(str, needed[name]))}" for name in sorted(needed)))
    tag = platform_tag(needed, platform.machine())
    name = _run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, wheel, capture=True)
    return out / name.splitlines()[-1]


def smoke_test(wheel: Path, folder: Path) -> None:
    """Install a wheel into a new environment that has no compiler on its path, and run the smoke test there."""
    python = folder / "venv" / "bin" / "python"
    _run(sys.executable, "-m", "venv", folder / "venv")
    programs = folder / "venv" / "bin"
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "PYTHONPATH")}
    clean = {name: value for name, value in clean.items() if not name.startswith("XSMOE_")}
    clean["PATH"] = str(programs)
    for compiler in ("c++", "g++", "clang++", "cc", "gcc", "ninja"):
        assert shutil.which(compiler, path=clean["PATH"]) is None, compiler
    install = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    _run(*install, "-c", ROOT / "constraints.txt", wheel, environment=clean)
    # -I: neither the repository nor the user's packages are on the path.
    _run(python, "-I", ROOT / "tools" / "smoke_test.py", environment=clean, cwd=folder)


def _run(
    *command: str | Path, environment: dict[str, str] | None = None, cwd: Path = ROOT, capture: bool = False
) -> str:
    pipe = subprocess.PIPE if capture else None
    print("+", *command, flush=True)
    ran = subprocess.run([str(part) for part in command], env=environment, cwd=cwd, stdout=pipe, text=True)
    if ran.returncode != 0:
        raise SystemExit(f"exit code {ran.returncode} of: {' '.join(map(str, command))}")
    return ran.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
