"""side_moe_group on Triton: levels of any sizes in one launch, with the bits of each level on its own."""

from typing import Any

import pytest
import torch

from tests.kernels.helpers.gpu_side_levels import (
    DIFFERENTIABLE,
    check_each_level_has_the_bits_that_it_has_on_its_own,
    layer,
    layers,
    outcome,
)
from tests.kernels.helpers.triton_gpu import needs_triton
from xsmoe_kernels import side_moe, side_moe_group, use_backend

pytestmark = needs_triton


def test_each_level_has_the_bits_that_it_has_on_its_own() -> None:
    check_each_level_has_the_bits_that_it_has_on_its_own("triton")


def launches(monkeypatch: pytest.MonkeyPatch, levels: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Return the number of levels of each launch of a kernel."""
    from xsmoe_kernels.triton_utils import kernel_helpers

    seen: dict[str, list[int]] = {}
    launch = kernel_helpers.launch

    def watched(kernel: Any, grid: tuple[int, ...], *rest: Any) -> None:
        seen.setdefault(kernel.fn.__name__, []).append(grid[1])
        launch(kernel, grid, *rest)

    monkeypatch.setattr(kernel_helpers, "launch", watched)
    with use_backend("triton"):
        results = side_moe_group(levels)
        torch.autograd.grad(sum(y.sum() for y in results), [level["down"] for level in levels])
    return seen


def test_levels_of_one_kind_share_their_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [layer(seed, 5 + seed, 16 * (seed + 1), seed + 1, 4, seed) for seed in range(3)]
    seen = launches(monkeypatch, levels)
    assert set(seen) >= {"gate_kernel", "hidden_kernel", "mixture_kernel", "count_kernel", "weight_gradient_kernel"}
    assert all(numbers == [3] for numbers in seen.values()), seen


def test_a_launch_has_up_to_eight_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = launches(monkeypatch, [layer(seed, 3, 16, 1, 2, 0) for seed in range(9)])
    assert all(sorted(numbers) == [1, 8] for numbers in seen.values()), seen


def test_dtypes_are_apart_and_come_back_in_order() -> None:
    levels = [
        layer(seed, 6, 16, 2, 4, 1, dtype=dtype) for seed, dtype in enumerate([torch.float32, torch.bfloat16] * 2)
    ]
    with use_backend("triton"):
        found = side_moe_group(levels)
        want = [side_moe(**level) for level in levels]
    for y, expected in zip(found, want, strict=True):
        assert torch.equal(y, expected)


def test_a_level_without_a_gradient_receives_none() -> None:
    levels = [layer(seed, 6, 16, 2, 4, 1) for seed in range(3)]
    for name in DIFFERENTIABLE:
        levels[1][name] = levels[1][name].detach()
    with use_backend("triton"):
        first, middle, _ = side_moe_group(levels)
    assert first.requires_grad
    first.sum().backward()
    assert levels[0]["down"].grad is not None
    assert all(levels[2][name].grad is None for name in DIFFERENTIABLE), "its result was not used"
    assert torch.isfinite(middle).all()


def test_compiles_as_one_graph() -> None:
    together, expected = layers(1)[::2], layers(1)[::2]
    with use_backend("triton"):
        found = torch.compile(side_moe_group, fullgraph=True, backend="aot_eager")(together)
        for y, want in zip(outcome(together, found), outcome(expected, side_moe_group(expected)), strict=True):
            torch.testing.assert_close(y, want)
