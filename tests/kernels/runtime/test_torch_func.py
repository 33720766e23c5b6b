"""Operators under torch.func and forward-mode differentiation: supported transforms, and errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.kernels.helpers.side_level import make_level
from xsmoe_kernels import (
    FrozenExperts,
    Utilization,
    grouped_mm,
    in_batch_softmax_loss,
    packed_attention,
    route_topk,
    side_moe,
    side_moe_group,
)

REFUSED = "forward-mode differentiation is not supported .* use reverse mode: backward, or torch.func.grad"


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LEVEL = make_level(6, 5, 2, 4, dtype=torch.float32, requires_grad=False)
OTHER = make_level(6, 5, 3, 4, dtype=torch.float32, requires_grad=False, one_row=True)
WEIGHT, ITEMS, OFFSETS = drawn(2, 3, 5), drawn(4, 3), torch.tensor([0, 1, 4])


def group(x: Tensor) -> Tensor:
    first = LEVEL._replace(x=x)._asdict()
    return torch.cat(side_moe_group([first, OTHER._replace(backbone=2 * x)._asdict()]))


def loss(queries: Tensor) -> Tensor:
    rejected = torch.tensor([[2], [-1], [0], [1]])
    return in_batch_softmax_loss(queries, ITEMS, torch.tensor([0, 1, 3, 3]), rejected)


Function = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, tuple[Function, Tensor]] = {
    "side_moe": (lambda x: side_moe(*LEVEL._replace(x=x)), LEVEL.x),
    "side_moe_group": (group, LEVEL.x),
    "grouped_mm": (lambda x: grouped_mm(x, WEIGHT, OFFSETS), drawn(4, 3)),
    "route_topk": (lambda logits: route_topk(logits, 2).gates, drawn(4, 3)),
    "packed_attention": (lambda q: packed_attention(q, 2 * q, q, OFFSETS, max_length=3), drawn(4, 2, 3)),
    "in_batch_softmax_loss": (loss, drawn(4, 3)),
}
every_operator = pytest.mark.parametrize(("function", "value"), FUNCTIONS.values(), ids=FUNCTIONS.keys())


def gradient(function: Function, value: Tensor) -> Tensor:
    value = value.clone().requires_grad_()
    return torch.autograd.grad(function(value).square().sum(), value)[0]


def in_a_dual_level(function: Function, value: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(value, torch.ones_like(value)))).tangent


def jvp(function: Function, value: Tensor) -> Tensor:
    return torch.func.jvp(function, (value,), (torch.ones_like(value),))[1]


def compiled_jvp(function: Function, value: Tensor) -> Tensor:
    torch.compiler.reset()
    return torch.compile(lambda value: jvp(function, value), backend="eager")(value)


FORWARD_MODES = [
    in_a_dual_level,
    jvp,
    compiled_jvp,
    lambda function, value: torch.func.jacfwd(function)(value),
    lambda function, value: jvp(torch.vmap(function), value[None]),
    lambda function, value: jvp(torch.func.grad(lambda value: function(value).sum()), value),
    lambda function, value: torch.func.linearize(function, value)[1](value),
]
MODE_NAMES = ["forward_ad", "jvp", "compiled jvp", "jacfwd", "jvp of vmap", "jvp of grad", "linearize"]


@every_operator
@pytest.mark.parametrize("mode", FORWARD_MODES, ids=MODE_NAMES)
def test_forward_mode_raises(mode: Callable[[Function, Tensor], Tensor], function: Function, value: Tensor) -> None:
    with pytest.raises(NotImplementedError, match=REFUSED):
        mode(function, value)


@pytest.mark.parametrize("mode", [in_a_dual_level, jvp])
def test_forward_mode_raises_for_calls_of_the_operator(mode: Callable[[Function, Tensor], Tensor]) -> None:
    rest = (*LEVEL[1:], *(None,) * 4, 0, True, False, "gelu", "auto")
    with pytest.raises(NotImplementedError, match="side_moe: " + REFUSED):
        mode(lambda x: torch.ops.xsmoe.side_moe(x, *rest)[0], LEVEL.x)
    lists = [[None] if part is None else [part] for part in rest[:-1]]
    with pytest.raises(NotImplementedError, match="side_moe_group: " + REFUSED):
        mode(lambda x: torch.ops.xsmoe.side_moe_group([x], *lists, rest[-1])[0][0], LEVEL.x)


def test_forward_mode_past_an_operator_is_none_of_its_business() -> None:
    constant = side_moe(*LEVEL)
    torch.testing.assert_close(jvp(lambda x: x * side_moe(*LEVEL), LEVEL.x), constant)
    torch.testing.assert_close(in_a_dual_level(lambda x: x * side_moe(*LEVEL), LEVEL.x), constant)


@every_operator
def test_reverse_mode_equals_backward(function: Function, value: Tensor) -> None:
    expected = gradient(function, value)
    torch.testing.assert_close(torch.func.grad(lambda value: function(value).square().sum())(value), expected)
    y, pull = torch.func.vjp(function, value)
    torch.testing.assert_close(pull(2 * y)[0], expected)
    jacobian = torch.func.jacrev(function)(value)
    torch.testing.assert_close(torch.tensordot(2 * y, jacobian, y.dim()), expected)


@every_operator
def test_vmap_is_a_loop_forward_and_of_gradients(function: Function, value: Tensor) -> None:
    values = torch.stack([value, 2 * value, -value])
    torch.testing.assert_close(torch.vmap(function)(values), torch.stack([function(each) for each in values]))
    found = torch.vmap(torch.func.grad(lambda value: function(value).square().sum()))(values)
    torch.testing.assert_close(found, torch.stack([gradient(function, each) for each in values]))
    inner = torch.func.grad(lambda values: torch.vmap(function, 1)(values.transpose(0, 1)).square().sum())
    torch.testing.assert_close(inner(values), found)


@every_operator
def test_differentiating_twice_raises(function: Function, value: Tensor) -> None:
    once = torch.func.grad(lambda value: function(value).square().sum())
    with pytest.raises(RuntimeError, match="can be differentiated once, not twice"):
        torch.func.grad(lambda value: once(value).sum())(value)


def test_frozen_experts_and_weights_go_through() -> None:
    level = make_level(6, 5, 3, 4, dtype=torch.float32, requires_grad=False)
    frozen = FrozenExperts(level.down[:2], level.up[:2])

    def function(up: Tensor) -> Tensor:
        return side_moe(*level[:3], level.down[2:], up, frozen=frozen, recompute=False)

    expected = gradient(function, level.up[2:])
    torch.testing.assert_close(torch.func.grad(lambda up: function(up).square().sum())(level.up[2:]), expected)


def test_a_wrong_level_of_a_group_is_named_before_any_counts() -> None:
    counters = Utilization(2)

    def function(x: Tensor) -> Tensor:
        first = LEVEL._replace(x=x)._asdict() | {"utilization": counters}
        return side_moe_group([first, LEVEL._replace(x=x[:2])._asdict()])[0].sum()

    with pytest.raises(ValueError, match=r"layers\[1\]: x must have the 6 rows of backbone"):
        torch.func.grad(function)(LEVEL.x)
    assert not counters.gate.any()


@pytest.mark.parametrize("differentiate", [torch.func.grad, torch.func.jacrev])
def test_gradients_count_rows_once(differentiate: Any) -> None:
    counters, expected = Utilization(2), Utilization(2)
    side_moe(*LEVEL, utilization=expected)
    differentiate(lambda x: side_moe(*LEVEL._replace(x=x), utilization=counters).sum())(LEVEL.x)
    assert torch.equal(counters.norm, expected.norm)
    assert torch.equal(counters.gate, expected.gate)


def test_vmap_counts_only_equal_increments() -> None:
    counters = Utilization(2)
    message = r"utilization cannot count under torch.func.vmap; pass utilization=None, or call eval\(\)"

    def function(x: Tensor) -> Tensor:
        return side_moe(*LEVEL._replace(x=x), utilization=counters)

    for transformed in (torch.vmap(function), torch.vmap(torch.func.grad(lambda x: function(x).sum()))):
        with pytest.raises(NotImplementedError, match=message):
            transformed(torch.stack([LEVEL.x] * 2))
    assert not counters.gate.any()
    torch.vmap(lambda factor: factor * function(LEVEL.x))(torch.ones(2))
    assert counters.gate.sum() == pytest.approx(6)


def test_an_empty_batch_is_named() -> None:
    with pytest.raises(ValueError, match="side_moe cannot run under torch.func.vmap over a dimension of size 0"):
        torch.vmap(lambda x: side_moe(*LEVEL._replace(x=x)))(torch.zeros(0, 6, 5))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_reverse_mode_inside_a_compiled_function_raises(transform: Any) -> None:
    torch.compiler.reset()
    function = torch.compile(transform(lambda x: side_moe(*LEVEL._replace(x=x)).sum()), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="side_moe: torch.func.grad, vjp and jacrev .* in eager code"):
        function(LEVEL.x)


def test_functionalize_sees_the_operator() -> None:
    def function(x: Tensor) -> Tensor:
        return side_moe(*LEVEL._replace(x=x))

    torch.testing.assert_close(torch.func.functionalize(function)(LEVEL.x), function(LEVEL.x))
    torch.testing.assert_close(gradient(torch.func.functionalize(function), LEVEL.x), gradient(function, LEVEL.x))
