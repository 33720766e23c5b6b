"""The check of commit subjects, and that the hooks and the workflow start what exists."""

import subprocess
import sys
from pathlib import Path

import pytest

import xsmoe_kernels

ROOT = Path(xsmoe_kernels.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "tools").exists(), reason="there are no sources next to the package")


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        ("topk_items: fewer passes over the items", None),
        ("docs, README: the demo as it is now", None),
        ("Merge branch 'main' into other", None),
        ("fewer passes", "must be `area: what changed`"),
        ("topk_items:", "must be `area: what changed`"),
        ("topk_items: " + "x" * 61, "has 73 characters; use at most 72"),
    ],
)
def test_a_subject_has_an_area_and_at_most_72_characters(subject: str, reason: str | None, tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.write_text(subject + "\n\nA body that may be as long as it likes. " + "x" * 80 + "\n")
    command = [sys.executable, ROOT / "tools" / "check_commit_subject.py", message]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode == 0) is (reason is None), ran.stderr
    assert (reason or "") in ran.stderr


def test_what_hooks_and_workflow_start_exists() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert "tools/check_commit_subject.py" in hooks
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run" in workflow
    assert (ROOT / ".ci" / "run").exists()
    assert "run: make wheel" in workflow
    assert "\nwheel:" in (ROOT / "Makefile").read_text()
