"""The scripts in examples/ run and print what they should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xsmoe

ROOT = Path(xsmoe.__file__).parents[1]
EXAMPLES = {
    "replace_mixture.py": (["--rows", "64", "--dim", "32"], r"all gradients agree\neager: .* ms.*\nside_moe: .* ms"),
    "train_next_item.py": (["--steps", "50"], r"before: HR@20 (0\.\d+)\n(?:.*\n)+after: HR@20 (0\.\d+)"),
    "grow_and_prune.py": (["--steps", "20"], r"dropped expert \d, which had a share of 0\.\d+\n"),
    "rank_catalogue.py": (["--items", "2000"], r"those of a full sort\n256 users, 2000 items: HR@10 0\.\d+"),
    "stream_catalogue.py": (["--users", "30", "--epochs", "1"], r"window 1: HR@10 \d\.\d+ .*\n.*: \[3, 3\]\n"),
}


def run(script: str, options: list[str], folder: Path) -> str:
    """Return what an example prints. Fail if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / script), *options]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("script", EXAMPLES)
def test_the_example_runs(script: str, tmp_path: Path) -> None:
    options, expected = EXAMPLES[script]
    printed = run(script, options, tmp_path)
    found = re.search(expected, printed)
    assert found, printed
    if script == "train_next_item.py":
        before, after = map(float, found.groups())
        assert after > before + 0.1, printed
    assert not list(tmp_path.iterdir()), "an example left files in the current folder"


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
