"""The examples of README.md and docs/getting_started.md run, and the public names that they use can be imported."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import xsmoe
import xsmoe_kernels

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
BEFORE, AFTER = CODE.findall((ROOT / "README.md").read_text())
LAYER, PARTS = CODE.findall((ROOT / "docs" / "getting_started.md").read_text())
PUBLIC = {
    xsmoe: ("ExpertBank", "Recommender", "SideMoE", "StreamingTrainer", "UserEncoder", "XSMoE"),
    xsmoe_kernels: (
        "FrozenExperts", "Utilization", "grouped_mm", "in_batch_softmax_loss", "info", "packed_attention",
        "rank_of_target", "route_topk", "side_moe", "side_moe_group", "sparse_side_moe", "topk_items", "use_backend",
    ),
}  # fmt: skip


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "example", "exec"), names)
    return names


def test_before_and_after_agree() -> None:
    torch.manual_seed(0)
    n, d, e, r = 32, 48, 4, 8
    names = {
        "torch": torch,
        "x": torch.randn(n, d),
        "backbone": torch.randn(n, d),
        "router": torch.randn(e + 1, d) / d**0.5,
        "down": torch.randn(e, r, d) / d**0.5,
        "up": torch.randn(e, r, d) / r**0.5,
    }
    before, after = run(BEFORE, dict(names))["y"], run(AFTER, dict(names))["y"]
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_public_names_can_be_imported(module: Any) -> None:
    for name in PUBLIC[module]:
        assert name in module.__all__
        assert getattr(module, name) is not None


def test_the_layer_and_the_item_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    run(LAYER, {})
    printed = capsys.readouterr().out
    assert "torch.Size([256, 768])" in printed
    assert "Expanded(level=1, num_experts=" in printed


def test_the_parts_in_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(PARTS, {})
    trained = [weight for module in ("table", "bank", "qkv") for weight in names[module].parameters()]
    assert len(trained) == 6
    assert all(weight.grad is not None for weight in trained)
    rank, size = re.fullmatch(r"tensor\((.*)\)\n(.*)\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert 1 <= float(rank) <= 1000
    assert size == "torch.Size([32, 10])"


@pytest.mark.parametrize(
    ("example", "most"), [(BEFORE, 5), (AFTER, 2), (LAYER, 20), (PARTS, 24)], ids=["before", "after", "layer", "parts"]
)
def test_examples_stay_short(example: str, most: int) -> None:
    code = [line for line in example.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= most


def test_the_readme_is_one_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert sum(not line.startswith(("|", "<!--")) for line in lines) <= 90
