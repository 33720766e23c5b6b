"""The README's examples run as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"
LAYER, PARTS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_layer_and_the_item_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(LAYER, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "torch.Size([256, 768])" in printed
    assert "Expanded(level=1, num_experts=" in printed


def test_the_parts_in_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(PARTS, str(README), "exec"), names)
    trained = [weight for module in ("table", "bank", "qkv") for weight in names[module].parameters()]
    assert len(trained) == 6
    assert all(weight.grad is not None for weight in trained)
    rank, size = re.fullmatch(r"tensor\((.*)\)\n(.*)\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert 1 <= float(rank) <= 1000
    assert size == "torch.Size([32, 10])"


@pytest.mark.parametrize(("example", "most"), [(LAYER, 20), (PARTS, 24)], ids=["layer", "parts"])
def test_examples_stay_short(example: str, most: int) -> None:
    code = [line for line in example.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= most
