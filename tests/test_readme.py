"""The README's example runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "torch.Size([256, 768])" in printed
    assert "Expanded(level=1, num_experts=" in printed


def test_example_stays_short() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = [line for line in example.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 20
