"""Common properties of all operators: views, second derivatives, bad input to compiled code, the meta device."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.side_level import make_level
from xsmoe_kernels import (
    FrozenExperts,
    grouped_mm,
    in_batch_softmax_loss,
    packed_attention,
    rank_of_target,
    route_topk,
    side_moe,
    topk_items,
)

OFFSETS = torch.tensor([0, 1, 4])
SEEN = (torch.tensor([0, 3, 1]), torch.tensor([0, 1, 3]))


INTEGERS = [
    (side_moe, "num_frozen", 2),
    (grouped_mm, "num_frozen", 2),
    (route_topk, "k", 2),
    (topk_items, "k", 2),
    (packed_attention, "max_length", 3),
]


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)


def index(*values: int) -> Tensor:
    return torch.tensor(values)


def good(operator: Callable[..., Any], **changes: Any) -> dict[str, Any]:
    """Return valid arguments of the operator, with the changes."""
    arguments: dict[Callable[..., Any], dict[str, Any]] = {
        side_moe: make_level(6, 5, 2, 4, dtype=torch.float32)._asdict(),
        grouped_mm: {"x": rows(4, 3), "weight": rows(2, 3, 5), "offsets": OFFSETS},
        route_topk: {"logits": rows(4, 3), "k": 2},
        packed_attention: dict.fromkeys("qkv", rows(4, 2, 3)) | {"offsets": OFFSETS, "max_length": 3},
        in_batch_softmax_loss: {
            "queries": rows(2, 3),
            "items": rows(4, 3),
            "targets": index(0, 1),
            "rejected": index(0, -1).view(2, 1),
        },
        rank_of_target: {"queries": rows(2, 3), "items": rows(4, 3), "targets": index(0, 1), "seen": SEEN},
        topk_items: {"queries": rows(2, 3), "items": rows(4, 3), "k": 2, "seen": SEEN},
    }
    return arguments[operator] | changes


def named(operator: Callable[..., Any]) -> str:
    return operator.__name__


OPERATORS = [side_moe, grouped_mm, route_topk, packed_attention, in_batch_softmax_loss, rank_of_target, topk_items]
DIFFERENTIABLE = [
    (side_moe, "x"),
    (grouped_mm, "x"),
    (route_topk, "logits"),
    (packed_attention, "q"),
    (in_batch_softmax_loss, "queries"),
]


def differentiable_result(operator: Callable[..., Any], arguments: dict[str, Any]) -> Tensor:
    result = operator(**arguments)
    return result.gates if operator is route_topk else result


@pytest.mark.parametrize(("operator", "name"), DIFFERENTIABLE)
def test_results_and_gradients_are_no_views_and_may_change_in_place(operator: Callable[..., Any], name: str) -> None:
    arguments = good(operator)
    y = differentiable_result(operator, arguments)
    assert not y._is_view()
    y.mul_(2).sum().backward()
    assert not arguments[name].grad._is_view()


@pytest.mark.parametrize(("operator", "name"), DIFFERENTIABLE)
def test_differentiating_twice_raises(operator: Callable[..., Any], name: str) -> None:
    arguments = good(operator)
    y = differentiable_result(operator, arguments).square().sum()
    (gradient,) = torch.autograd.grad(y, arguments[name], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator.__name__} can be differentiated once, not twice"):
        gradient.sum().backward()


BAD = [
    (side_moe, {"up": torch.zeros(2, 5, 4)}, "up must have shape (2, 4, 5), not (2, 5, 4)"),
    (side_moe, {"row_weight": torch.ones(1)}, "row_weight must have shape (6,), not (1,)"),
    (side_moe, {"num_frozen": 3}, "num_frozen must be from 0 to 2, the number of experts, not 3"),
    (
        side_moe,
        {"frozen": FrozenExperts(torch.zeros(1, 4, 5), torch.zeros(1, 4, 5))},
        "router must have 4 rows, one for the backbone and one for each of the 3 experts (1 of them frozen), not 3",
    ),
    (grouped_mm, {"weight": torch.zeros(4, 3, 5)}, "offsets must have shape (5,), not (3,)"),
    (grouped_mm, {"num_frozen": 9}, "num_frozen must be from 0 to 2, the number of experts, not 9"),
    (route_topk, {"k": 5}, "k must be from 1 to 3, the number of experts, not 5"),
    (packed_attention, {"k": torch.zeros(3, 2, 3)}, "k must have shape (4, 2, 3), not (3, 2, 3)"),
    (packed_attention, {"dropout_p": 1.5}, "dropout_p must lie in [0, 1), not 1.5"),
    (packed_attention, {"max_length": 2}, "max_length must be at least 3, the longest sequence of offsets, not 2"),
    (in_batch_softmax_loss, {"counts": torch.ones(1)}, "counts must have shape (4,), not (1,)"),
    (in_batch_softmax_loss, {"logq": torch.zeros(1)}, "logq must have shape (4,), not (1,)"),
    (in_batch_softmax_loss, {"targets": index(0, 4)}, "targets must lie in [0, 4)"),
    (rank_of_target, {"targets": index(1)}, "targets must have shape (2,), not (1,)"),
    (rank_of_target, {"seen": (SEEN[0], SEEN[1][:2])}, "seen offsets must have shape (3,), not (2,)"),
    (topk_items, {"items": torch.zeros(4, 1)}, "items must have shape (C, 3), not (4, 1)"),
    (topk_items, {"k": 0}, "k must be at least 1, not 0"),
]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize(("operator", "bad", "message"), BAD)
def test_bad_input_is_named_in_compiled_code_too(
    operator: Callable[..., Any], bad: dict[str, Any], message: str, mode: str
) -> None:
    function = compiled(operator) if mode == "compiled" else operator
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**good(operator, **bad))


def test_bad_input_is_named_by_the_default_compiler_too() -> None:
    function = compiled(lambda logits, k: route_topk(logits.tanh(), k).gates, backend="inductor")
    with pytest.raises(ValueError, match="k must be from 1 to 3, the number of experts, not 5"):
        function(rows(4, 3), 5)


@pytest.mark.parametrize(("operator", "name", "value"), INTEGERS)
def test_integers_may_be_those_of_numpy_but_no_tensors(operator: Callable[..., Any], name: str, value: int) -> None:
    expected = operator(**good(operator, **{name: value}))
    found = operator(**good(operator, **{name: np.int64(value)}))
    assert torch.equal(*(value if isinstance(value, Tensor) else value[0] for value in (expected, found)))
    with pytest.raises(TypeError, match=f"{name} must be an int, not Tensor"):
        operator(**good(operator, **{name: torch.tensor(value)}))
    with pytest.raises(TypeError, match=f"{name} must be an int, not ndarray"):
        operator(**good(operator, **{name: np.array([value, value])}))


def on_meta(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(on_meta, value))
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("operator", OPERATORS, ids=named)
def test_runs_on_the_meta_device(operator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XSMOE_DEBUG", "1")
    arguments = good(operator)
    wanted = operator(**arguments)
    results = operator(**{name: on_meta(value) for name, value in arguments.items()})
    if isinstance(wanted, Tensor):
        wanted, results = (wanted,), (results,)
    assert [(t.device.type, t.shape, t.dtype) for t in results] == [("meta", t.shape, t.dtype) for t in wanted]


def test_shapes_are_checked_on_the_meta_device() -> None:
    x, weight, offsets = (on_meta(value) for value in good(grouped_mm, weight=rows(4, 3, 5)).values())
    with pytest.raises(ValueError, match=re.escape("offsets must have shape (5,), not (3,)")):
        grouped_mm(x, weight, offsets)


@pytest.mark.parametrize("operator", [side_moe, route_topk])
def test_vmap_runs_the_operator(operator: Callable[..., Any]) -> None:
    if operator is route_topk:
        rows = torch.randn(2, 5, 3)
        found = torch.vmap(lambda logits: route_topk(logits, 2).gates)(rows)
        want = torch.stack([route_topk(logits, 2).gates for logits in rows])
    else:
        arguments = {name: value.detach() for name, value in good(side_moe).items() if isinstance(value, Tensor)}
        rows = torch.stack([arguments["x"], 2 * arguments["x"]])
        found = torch.vmap(lambda x: side_moe(**{**arguments, "x": x}))(rows)
        want = torch.stack([side_moe(**{**arguments, "x": x}) for x in rows])
    torch.testing.assert_close(found, want)
