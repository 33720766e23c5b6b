"""docs/environment_variables.md lists every XSMOE_* variable that the sources read, and no other."""

import re
from pathlib import Path

import xsmoe_kernels

ROOT = Path(xsmoe_kernels.__file__).parents[1]
PAGE = ROOT / "docs" / "environment_variables.md"
SOURCES = ("Makefile", ".ci/run", "*.py", "*.sh", "xsmoe*/**/*.py", "bench/**/*.py", "bench/**/*.sh", "csrc/**/*")
SOURCES += ("tests/**/*.py", "tools/**/*.py", "examples/**/*.py")
NAME = r"XSMOE_[A-Z0-9_]+"


def variables(path: Path) -> set[str]:
    """Return the environment variables that a source names. Macros of C++ are none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in {".cpp", ".cu", ".h"}:
        return set(re.findall(rf'getenv\("({NAME})"\)', text))
    # -DXSMOE_... and XSMOE_...(x) are macros that the build defines.
    return set(re.findall(rf"\b({NAME})\b(?!\()", text.replace("-DXSMOE_", "-D_")))


def test_the_page_lists_all_variables_and_no_other() -> None:
    paths = {path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file() and path != Path(__file__)}
    read = {name: path for path in sorted(paths) for name in variables(path)}
    assert len(read) > 10, "the sources are not where this test looks for them"
    listed = set(re.findall(rf"^\| `({NAME})` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    missing = {name: str(path.relative_to(ROOT)) for name, path in read.items() if name not in listed}
    assert not missing, f"{PAGE.name} does not list these"
    assert listed <= set(read), f"{PAGE.name} lists variables that nothing reads: {sorted(listed - set(read))}"
