"""side_moe_group: several levels in one call."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.side_level import make_level
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, side_moe_group


def layers() -> list[dict[str, Any]]:
    """Return three levels that differ in rows, width, rank, experts, freezing and counting."""
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


def test_accepts_an_iterator() -> None:
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


@pytest.mark.parametrize("apart", [False, True])
def test_opcheck(apart: bool) -> None:
    dtype = torch.bfloat16 if apart else torch.float32
    levels = [make_level(6, 5, 3, 4, dtype=dtype), make_level(4, 7, 2, 3, one_row=True, seed=1, dtype=dtype)]
    columns = [list(column) for column in zip(*levels, strict=True)]
    frozen: list[list[Tensor | None]] = [[None, None] for _ in range(3)]
    if apart:
        # One level of the two.
        frozen[0][0], frozen[1][0] = levels[0].down[:2].detach(), levels[0].up[:2].detach()
        columns[3][0], columns[4][0] = (columns[i][0].detach()[2:].requires_grad_() for i in (3, 4))
    weights = [torch.rand(6), None]
    settings = [0, 1], [apart, False], [True, False], ["gelu", "relu"]
    forward = (*columns, *frozen, weights, *settings, "auto")
    torch.library.opcheck(torch.ops.xsmoe.side_moe_group.default, forward)

    _, gates, hidden, _, _ = torch.ops.xsmoe.side_moe_group(*forward)
    grads = [torch.randn(level.backbone.shape, dtype=dtype) for level in levels]
    inputs = [[tensor.detach() for tensor in column] for column in columns]
    needed = [[True, False], [True, True], [True, True], [True, False], [False, True]]
    num_frozen, recompute, _, activation = settings
    backward = (grads, *inputs, *frozen, gates, hidden, num_frozen, recompute, activation, *needed, "auto")
    torch.library.opcheck(torch.ops.xsmoe.side_moe_group_backward.default, backward)


def test_every_level_has_frozen_experts_and_weights() -> None:
    def level(seed: int) -> dict[str, Any]:
        drawn = make_level(6, 5, 3, 4, seed=seed)
        bank = FrozenExperts(drawn.down[:2], drawn.up[:2])
        weights = {name: getattr(drawn, name)[2:].detach().requires_grad_() for name in ("down", "up")}
        return {**drawn._asdict(), **weights, "frozen": bank, "row_weight": torch.ones(6)}

    together, apart = [level(0), level(1)], [level(0), level(1)]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in side_moe_group(together)), leaves(together))
    wanted = torch.autograd.grad(sum(side_moe(**one).square().sum() for one in apart), leaves(apart))
    for gradient, want in zip(gradients, wanted, strict=True):
        assert torch.equal(gradient, want)


def test_a_result_that_is_not_used_has_no_gradients() -> None:
    levels = layers()
    first, *_ = side_moe_group(levels)
    first.sum().backward()
    assert levels[0]["x"].grad is not None
    assert all(level[name].grad is None for level in levels[1:] for name in ("x", "router", "down"))


def test_several_dtypes_are_checked_before_any_level_is_computed() -> None:
    levels = layers()
    for name in ("x", "backbone", "router", "down", "up"):
        levels[1][name] = levels[1][name].float()
    levels[2]["activation"] = "swish"
    with pytest.raises(ValueError, match=r"^layers\[2\]: activation must be one of"):
        side_moe_group(levels)
    assert not levels[0]["utilization"].gate.any()
    levels[2]["activation"] = "gelu"
    assert [y.dtype for y in side_moe_group(levels)] == [torch.float64, torch.float32, torch.float64]
