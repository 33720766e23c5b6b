"""One declaration per operator: the schemas, autograd and list variant that are derived from it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from xsmoe_kernels.runtime import dispatch, registration
from xsmoe_kernels.runtime.declaration import Input, Operator, by_name
from xsmoe_kernels.runtime.list_operator import ListOperator

SCALED_SUM = Operator(
    "test_scaled_sum",
    inputs=(
        Input("x", grad=True),
        Input("scale", "float"),
        Input("shift", "Tensor?", backward=False),
        Input("other", grad=True),
        Input("square", "bool", backward=False),
    ),
    outputs=("y", "product"),
    saved=("product",),
)
"""y = scale * x * other + shift, and product = x * other; squares y where it is asked to."""


def forward(x: Tensor, scale: float, shift: Tensor | None, other: Tensor, square: bool) -> tuple[Tensor, Tensor]:
    y = scale * x * other + (0 if shift is None else shift)
    return y.square() if square else y, x * other


def backward(
    grad: Tensor, x: Tensor, product: Tensor, scale: float, other: Tensor, need_x: bool, need_other: bool
) -> tuple[Tensor, Tensor]:
    assert torch.equal(product, x * other)
    return grad * scale * other if need_x else x.new_empty(0), grad * scale * x if need_other else x.new_empty(0)


def fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def check(x: Tensor, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError("other must have the shape of x")


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[tuple[object, ListOperator]]:
    registries = (dispatch._kernels, dispatch._limits, dispatch._element_operators)
    before = [dict(registry) for registry in registries]
    single = registration.define(SCALED_SUM, reference=forward, reference_backward=backward, fake=fake, check=check)
    yield single, ListOperator(SCALED_SUM, "test_scaled_sums", fake=fake, check=check, argument="calls")
    # info() reports every operator that has a kernel.
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)  # type: ignore[arg-type]


def inputs(rows: int, square: bool = False) -> list[object]:
    x, other = (torch.arange(1.0, rows + 1, requires_grad=True) for _ in range(2))
    return [x, 3.0, torch.ones(rows), other, square]


def test_schemas() -> None:
    assert SCALED_SUM.schema == (
        "(Tensor x, float scale, Tensor? shift, Tensor other, bool square, str backend) -> (Tensor y, Tensor product)"
    )
    assert SCALED_SUM.backward().name == "test_scaled_sum_backward"
    assert SCALED_SUM.backward().schema == (
        "(Tensor grad, Tensor x, Tensor product, float scale, Tensor other, bool need_x, bool need_other, str backend)"
        " -> (Tensor x, Tensor other)"
    )
    assert SCALED_SUM.as_lists("many").schema == (
        "(Tensor[] x, float[] scale, Tensor?[] shift, Tensor[] other, bool[] square, str backend)"
        " -> (Tensor[] y, Tensor[] product)"
    )
    single_gradient = replace(SCALED_SUM, inputs=SCALED_SUM.inputs[:2], saved=())
    assert single_gradient.backward().schema == "(Tensor grad, Tensor x, float scale, str backend) -> (Tensor x)"


@pytest.mark.parametrize("fullgraph", [False, True])
def test_derived_autograd(operators: tuple[object, ListOperator], fullgraph: bool) -> None:
    single = operators[0]
    assert callable(single)
    x, scale, shift, other, square = inputs(3)
    function = torch.compile(single, fullgraph=True, backend="aot_eager") if fullgraph else single
    y, product = function(x, scale, shift, other, square, "auto")
    assert not product.requires_grad
    assert isinstance(x, Tensor)
    assert isinstance(other, Tensor)
    torch.testing.assert_close(y, 3 * x * other + 1)
    y.backward(torch.tensor([1.0, 2, 3]))
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 2, 3]) * 3 * other)
    torch.testing.assert_close(other.grad, torch.tensor([1.0, 2, 3]) * 3 * x)
    frozen = other.detach()
    function(x, scale, shift, frozen, square, "auto")[0].sum().backward()
    assert frozen.grad is None


def test_derived_shapes_agree_with_the_kernels(operators: tuple[object, ListOperator]) -> None:
    arguments = (*inputs(3), "auto")
    torch.library.opcheck(torch.ops.xsmoe.test_scaled_sum.default, arguments)
    gradients = torch.ops.xsmoe.test_scaled_sum_backward.default
    x = torch.ones(3)
    torch.library.opcheck(gradients, (x, x, x * x, 3.0, x, False, True, "auto"), test_utils="test_faketensor")


@pytest.mark.parametrize("fullgraph", [False, True])
def test_list_variant(operators: tuple[object, ListOperator], fullgraph: bool) -> None:
    many = operators[1]
    calls = [inputs(2), inputs(3), inputs(4)]
    columns = [list(column) for column in zip(*calls, strict=True)]
    function = torch.compile(many.__call__, fullgraph=True, backend="aot_eager") if fullgraph else many
    y, product = function(columns, "auto")
    assert not any(tensor.requires_grad for tensor in product)
    (y[0].sum() + y[2].sum()).backward()
    for place, (x, scale, shift, other, _) in enumerate(calls):
        assert isinstance(x, Tensor)
        assert isinstance(other, Tensor)
        torch.testing.assert_close(y[place], scale * x * other + shift)
        if place == 1:
            # A compiled graph returns zeros.
            assert x.grad is None or (fullgraph and not x.grad.any())
        else:
            torch.testing.assert_close(x.grad, 3 * other)
            torch.testing.assert_close(other.grad, 3 * x)


def test_list_variant_names_the_call_that_is_wrong(operators: tuple[object, ListOperator]) -> None:
    calls = [inputs(2), inputs(3)]
    calls[1][3] = torch.ones(7)
    with pytest.raises(ValueError, match=r"calls\[1\]: other must have the shape of x"):
        operators[1]([list(column) for column in zip(*calls, strict=True)], "auto")


def test_functions_name_arguments_of_the_operator_only() -> None:
    assert by_name(lambda scale, x: (scale, x), SCALED_SUM.names)((1, 2, 3, 4, 5)) == (2, 1)
    with pytest.raises(TypeError, match="no arguments of the operator: .'scales'"):
        by_name(lambda scales: scales, SCALED_SUM.names)
