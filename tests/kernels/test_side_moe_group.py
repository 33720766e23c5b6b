"""side_moe_group: several levels in one call."""

from typing import Any

import pytest
import torch
from compilation import compiled
from side_level import make_level
from torch import Tensor

from xsmoe_kernels import FrozenExperts, Utilization, side_moe, side_moe_group


def layers() -> list[dict[str, Any]]:
    """Three levels that differ in rows, width, rank, experts, freezing and counting."""
    first = make_level(6, 5, 3, 4, one_row=True, seed=0)
    second = make_level(6, 7, 1, 2, seed=1)
    third = make_level(3, 5, 4, 3, seed=2)
    frozen = FrozenExperts(third.down[:3], third.up[:3])
    weights = {name: getattr(third, name)[3:].detach().requires_grad_() for name in ("down", "up")}
    return [
        {**first._asdict(), "num_frozen": 2, "utilization": Utilization(3), "row_weight": torch.rand(6)},
        {**second._asdict(), "activation": "relu", "recompute": True},
        {**third._asdict(), **weights, "frozen": frozen, "utilization": Utilization(4)},
    ]


def leaves(levels: list[dict[str, Any]]) -> list[Tensor]:
    return [level[name] for level in levels for name in ("x", "backbone", "router", "down", "up")]


def test_equals_side_moe_level_by_level() -> None:
    together, apart = layers(), layers()
    for level, twin in zip(together, apart, strict=True):
        if "row_weight" in level:
            twin["row_weight"] = level["row_weight"]
    results, expected = side_moe_group(together), [side_moe(**level) for level in apart]
    assert isinstance(results, list)
    for y, want in zip(results, expected, strict=True):
        assert torch.equal(y, want)
    gradients = torch.autograd.grad(sum(y.square().sum() for y in results), leaves(together))
    wanted = torch.autograd.grad(sum(y.square().sum() for y in expected), leaves(apart))
    for gradient, want in zip(gradients, wanted, strict=True):
        assert torch.equal(gradient, want)
    for place in (0, 2):
        assert torch.equal(together[place]["utilization"].norm, apart[place]["utilization"].norm)
        assert torch.equal(together[place]["utilization"].gate, apart[place]["utilization"].gate)


def test_no_levels() -> None:
    assert side_moe_group([]) == []


def test_takes_an_iterator() -> None:
    first, second = layers(), layers()
    second[0]["row_weight"] = first[0]["row_weight"]
    for y, want in zip(side_moe_group(iter(first)), side_moe_group(second), strict=True):
        assert torch.equal(y, want)


def test_layers_that_hold_nothing_are_named() -> None:
    with pytest.raises(TypeError, match="layers must hold a mapping of side_moe's arguments for each level, not None"):
        side_moe_group(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"layers\[0\]: a level must be a mapping of side_moe's arguments, not str"):
        side_moe_group(layers()[0])  # type: ignore[arg-type]


def test_an_iterator_compiles_as_one_graph() -> None:
    levels, expected = layers(), layers()
    expected[0]["row_weight"] = levels[0]["row_weight"]
    results = compiled(lambda: side_moe_group(level for level in levels))()
    for y, want in zip(results, side_moe_group(expected), strict=True):
        torch.testing.assert_close(y, want)


def test_compiles_as_one_graph() -> None:
    together, expected = layers(), layers()
    expected[0]["row_weight"] = together[0]["row_weight"]
    for y, want in zip(compiled(side_moe_group)(together), side_moe_group(expected), strict=True):
        torch.testing.assert_close(y, want)
    torch.testing.assert_close(together[0]["utilization"].norm, expected[0]["utilization"].norm)


@pytest.mark.parametrize(
    ("place", "changes", "error", "message"),
    [
        (2, {"activation": "swish"}, ValueError, r"^layers\[2\]: activation must be one of"),
        (1, {"x": torch.zeros(6, 6)}, ValueError, r"^layers\[1\]: x must have shape \(N, 7\), not \(6, 6\)"),
        (2, {"up": None}, TypeError, r"^layers\[2\]: up must be a Tensor"),
        (1, {"backbone": torch.zeros(6, 7)}, TypeError, r"^layers\[1\]: backbone is torch.float32, but x is"),
        (0, {"rank": 3}, TypeError, r"^layers\[0\]: .*unexpected keyword argument 'rank'"),
    ],
)
def test_an_error_names_the_level_before_any_is_computed(
    place: int, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    levels = layers()
    levels[place] |= changes
    with pytest.raises(error, match=message):
        side_moe_group(levels)
    assert not levels[0]["utilization"].gate.any()


def test_a_missing_argument_and_a_level_that_is_no_mapping() -> None:
    levels = layers()
    del levels[1]["router"]
    with pytest.raises(TypeError, match=r"^layers\[1\]: missing a required argument: 'router'"):
        side_moe_group(levels)
    with pytest.raises(TypeError, match=r"^layers\[0\]: a level must be a mapping of side_moe's arguments, not tuple"):
        side_moe_group([(1, 2)])
