"""grouped_mm against a loop over rows, and its gradients."""

import re
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.helpers.compilation import compiled, unbacked
from tests.kernels.helpers.error_budget import assert_within_budget
from tests.kernels.helpers.native_library import needs_library
from xsmoe_kernels.ops.grouped_mm import grouped_mm, reference
from xsmoe_kernels.ops.route_topk import route_topk
from xsmoe_kernels.runtime import dispatch


def loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Compute the result row by row in the arguments' dtype; differentiable."""
    y = x.new_zeros(len(x), weight.shape[2]) + 0 * weight.sum()
    rows = list(y.unbind())
    for expert in range(len(weight)):
        for row in range(int(offsets[expert]), int(offsets[expert + 1])):
            rows[row] = x[row] @ weight[expert]
    return torch.stack(rows) if rows else y


def make(num_rows: int, bounds: list[int], inner: int, outer: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, inner, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(len(bounds) - 1, inner, outer, dtype=torch.float64, generator=generator, requires_grad=True)
    return x, weight, torch.tensor(bounds)


def outputs(function: Any, x: Tensor, weight: Tensor, offsets: Tensor, **options: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result and the gradients of x and weight for an upstream gradient without equal entries."""
    y = function(x, weight, offsets, **options)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return y, *torch.autograd.grad(y, (x, weight), upstream, allow_unused=True, materialize_grads=True)


# The reference iterates over groups in two ways; _masks is for devices whose offsets it must not read.
both_ways = pytest.mark.parametrize("way", ["_groups", "_masks"])


def going(way: str) -> Any:
    return mock.patch.object(reference, "_groups", getattr(reference, way))


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, list[int]]:
    num_rows = draw(st.integers(0, 12))
    cuts = draw(st.lists(st.integers(0, num_rows), min_size=1, max_size=34))
    return num_rows, sorted(cuts)


@both_ways
@settings(deadline=None, derandomize=True, max_examples=40)
@given(groups(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 33), st.integers(0, 100))
def test_equals_a_loop_over_rows(
    way: str, case: tuple[int, list[int]], inner: int, outer: int, num_frozen: int, seed: int
) -> None:
    num_rows, bounds = case
    x, weight, offsets = make(num_rows, bounds, inner, outer, seed)
    num_frozen = min(num_frozen, len(weight))
    y, grad_x, grad_weight = outputs(loop, x, weight, offsets)
    grad_weight = grad_weight * (torch.arange(len(weight)) >= num_frozen)[:, None, None]
    with going(way):
        actual = outputs(grouped_mm, x, weight, offsets, num_frozen=num_frozen)
    torch.testing.assert_close(actual, (y, grad_x, grad_weight))


@both_ways
def test_rows_outside_the_offsets_are_zeros_whatever_they_hold(way: str) -> None:
    x, weight, offsets = make(7, [2, 4, 4, 5], 3, 2)
    with torch.no_grad():
        x[:2], x[5:] = torch.nan, torch.inf
    outside = [0, 1, 5, 6]
    with going(way):
        y, grad_x, grad_weight = outputs(grouped_mm, x, weight, offsets)
    assert (y[outside] == 0).all()
    assert (grad_x[outside] == 0).all()
    assert grad_weight.isfinite().all()
    assert (grad_weight[1] == 0).all(), "an empty group has no gradient"


@both_ways
def test_all_experts_frozen_still_hand_on_the_gradient_of_x(way: str) -> None:
    x, weight, offsets = make(5, [0, 2, 5], 3, 2)
    with going(way):
        _, grad_x, grad_weight = outputs(grouped_mm, x, weight, offsets, num_frozen=2)
    assert (grad_weight == 0).all()
    torch.testing.assert_close(grad_x, outputs(loop, x, weight, offsets)[1])


def test_a_frozen_expert_costs_no_product() -> None:
    x, weight, offsets = make(6, [0, 2, 4, 6], 3, 2)
    y = grouped_mm(x.detach(), weight, offsets, num_frozen=2)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(y.sum(), weight)
    products = [event for event in profile.events() if event.name == "aten::mm"]
    assert len(products) == 1


def test_no_experts() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(0, 4, 2, requires_grad=True)
    y, grad_x, grad_weight = outputs(grouped_mm, x, weight, torch.tensor([0]))
    assert (y == 0).all()
    assert (grad_x == 0).all()
    assert grad_weight.shape == (0, 4, 2)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_gradcheck_of_every_subset(needs: tuple[bool, bool]) -> None:
    x, weight, offsets = make(6, [0, 2, 2, 5], 3, 2)
    x.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    assert torch.autograd.gradcheck(grouped_mm, (x, weight, offsets))


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget(dtype: torch.dtype, way: str) -> None:
    x, weight, offsets = make(96, [0, 40, 40, 41, 90], 48, 33)
    rounded = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    with going(way), dispatch.use_backend("reference"):
        actual = outputs(grouped_mm, *rounded, offsets)
    for name, *values in zip(
        ("y", "gradient of x", "gradient of weight"),
        actual,
        outputs(loop, *rounded, offsets),
        outputs(loop, *exact, offsets),
        strict=True,
    ):
        assert_within_budget(*values, name)


def test_routed_rows_give_the_dense_mixture() -> None:
    x, weight = torch.randn(10, 4), torch.randn(5, 4, 3)
    logits = torch.randn(10, 5)
    routing = route_topk(logits, 2)
    served = grouped_mm(x[routing.order // 2], weight, routing.offsets)
    y = torch.zeros(10, 3).index_add(0, routing.order // 2, served * routing.gates.flatten()[routing.order, None])
    gates = torch.zeros(10, 5).scatter(1, routing.experts, routing.gates)
    torch.testing.assert_close(y, torch.einsum("ne,nd,edp->np", gates, x, weight))


def test_int32_offsets_and_strided_inputs() -> None:
    x, weight = torch.randn(4, 6).T, torch.randn(2, 3, 4).mT
    offsets = torch.tensor([0, 9, 2, 9, 6, 9], dtype=torch.int32)[::2]
    torch.testing.assert_close(
        outputs(grouped_mm, x.requires_grad_(), weight.requires_grad_(), offsets), outputs(loop, x, weight, offsets)
    )


def test_opcheck() -> None:
    x, weight, offsets = (t.detach() for t in make(6, [0, 2, 2, 5], 3, 2))
    arguments = (x.requires_grad_(), weight.requires_grad_(), offsets, 1, "auto")
    torch.library.opcheck(torch.ops.xsmoe.grouped_mm, arguments)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = (torch.randn(6, 2).double(), x.detach(), weight.detach(), offsets, 1, *needs, "auto")
        torch.library.opcheck(torch.ops.xsmoe.grouped_mm_backward, arguments)


def test_compiles_to_one_graph_with_unknown_sizes() -> None:
    x, weight, offsets = make(6, [0, 2, 2, 5], 3, 2)
    expected = outputs(grouped_mm, x, weight, offsets, num_frozen=1)
    unbacked(x, weight, offsets)
    torch.testing.assert_close(outputs(compiled(grouped_mm), x, weight, offsets, num_frozen=1), expected)


def test_a_growing_bank_does_not_recompile_for_ever() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(grouped_mm, backend=counter)
    for num_experts in range(2, 8):
        x, weight, offsets = make(6, [0, *[6] * num_experts], 3, 2)
        function(x, weight, offsets, num_frozen=num_experts - 1)
    assert counter.frame_count <= 3


def test_autocast_casts_x_and_weight() -> None:
    x, weight, offsets = make(6, [0, 2, 6], 3, 2)
    x, weight = x.detach().float().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, grad_x, grad_weight = outputs(grouped_mm, x, weight, offsets)
    torch.testing.assert_close(y, loop(x.bfloat16(), weight, offsets))
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


def test_the_reference_ran() -> None:
    x, weight, offsets = make(6, [0, 2, 6], 3, 2)
    before = dispatch.calls.copy()
    with dispatch.use_backend("reference"):
        y = grouped_mm(x, weight, offsets)
    y.sum().backward()
    assert dispatch.calls - before == {("grouped_mm", "reference"): 1, ("grouped_mm_backward", "reference"): 1}


def on(backend: str, grad: Tensor, *arguments: Any, needs: tuple[bool, bool] = (True, True)) -> tuple[Tensor, ...]:
    """Return the results of the operator and its backward; `arguments` are x, weight, offsets and num_frozen."""
    y = torch.ops.xsmoe.grouped_mm(*arguments, backend)
    return y, *torch.ops.xsmoe.grouped_mm_backward(grad, *arguments, *needs, backend)


def strided(*shape: int, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    if layout == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).to(dtype).mT
    if layout == "apart":
        return torch.randn(*shape[:-1], 2 * shape[-1] + 3, generator=generator).to(dtype)[..., 3::2]
    return torch.randn(*shape, generator=generator).to(dtype)


LAYOUTS = st.sampled_from(["plain", "transposed", "apart"])
# Around the block sizes of products and panels of columns, on every instruction set.
SIZES = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 16, 17, 31, 32, 33, 64, 65, 100, 290])


@needs_library
@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    # Groups that are empty, that are too small to pack weights for, and that are longer than a tile.
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 5, 8, 9, 14, 15, 33, 70, 300]), min_size=2, max_size=35),
    inner=SIZES,
    columns=SIZES,
    frozen=st.integers(0, 33),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    index=st.sampled_from([torch.int32, torch.int64]),
    needs=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    seed=st.integers(0, 100),
)
def test_native_stays_within_the_error_budget(
    sizes: list[int],
    inner: int,
    columns: int,
    frozen: int,
    dtype: torch.dtype,
    layouts: tuple[str, str, str],
    index: torch.dtype,
    needs: tuple[bool, bool],
    seed: int,
) -> None:
    # The first and the last of the sizes are rows outside of all groups.
    offsets = torch.tensor(sizes[:-1]).cumsum(0).to(index)
    num_rows, num_experts = sum(sizes), len(sizes) - 2
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_rows, inner), (num_experts, inner, columns), (num_rows, columns)
    x, weight, grad = (
        strided(*shape, dtype=dtype, layout=layout, generator=generator)
        for shape, layout in zip(shapes, layouts, strict=True)
    )
    rest = offsets, min(frozen, num_experts)
    actual, same_dtype, exact = (
        on(backend, grad.to(wide), x.to(wide), weight.to(wide), *rest, needs=needs)
        for backend, wide in (("native", dtype), ("reference", dtype), ("reference", torch.float64))
    )
    for name, *values in zip(("y", "gradient of x", "gradient of weight"), actual, same_dtype, exact, strict=True):
        assert_within_budget(*values, name)
    outside = torch.ones(num_rows, dtype=torch.bool)
    outside[int(offsets[0]) : int(offsets[-1])] = False
    assert (actual[0][outside] == 0).all()
    assert not needs[0] or (actual[1][outside] == 0).all()
    assert not needs[1] or (actual[2][: rest[1]] == 0).all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_skips_the_weight_gradients_of_every_number_of_frozen_experts(dtype: torch.dtype) -> None:
    x, weight, grad = torch.randn(40, 17).to(dtype), torch.randn(4, 17, 9).to(dtype), torch.randn(40, 9).to(dtype)
    offsets = torch.tensor([0, 11, 11, 20, 40])
    expected = on("native", grad, x, weight, offsets, 0)[2]
    for num_frozen in range(5):
        actual = on("native", grad, x, weight, offsets, num_frozen)[2]
        assert (actual[:num_frozen] == 0).all()
        assert torch.equal(actual[num_frozen:], expected[num_frozen:])


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_does_not_read_rows_outside_the_offsets(dtype: torch.dtype) -> None:
    x, weight, grad = torch.randn(60, 33).to(dtype), torch.randn(2, 33, 20).to(dtype), torch.randn(60, 20).to(dtype)
    offsets = torch.tensor([7, 10, 50])
    expected = on("native", grad, x, weight, offsets, 0)
    for outside in (slice(0, 7), slice(50, 60)):
        x[outside], grad[outside] = torch.nan, torch.inf
    for actual, wanted in zip(on("native", grad, x, weight, offsets, 0), expected, strict=True):
        assert torch.equal(actual, wanted)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_native_is_deterministic_for_any_number_of_threads(dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(700, 100, generator=generator).to(dtype), torch.randn(700, 200, generator=generator).to(dtype)
    weight = strided(6, 100, 200, dtype=dtype, layout=layout, generator=generator)
    # A cut between threads may leave a few rows of a large group to one of them.
    offsets = torch.tensor([0, 3, 300, 300, 309, 310, 690])
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 1, 2, 3, 8):
            torch.set_num_threads(number)
            results.append(on("native", grad, x, weight, offsets, 1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("inner, columns", [(3000, 200), (200, 3000)])
def test_native_cuts_weights_that_are_larger_than_the_cache(inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(50, inner, generator=generator), torch.randn(50, columns, generator=generator)
    weight, offsets = torch.randn(2, inner, columns, generator=generator), torch.tensor([0, 5, 50])
    actual, same_dtype = (on(backend, grad, x, weight, offsets, 0) for backend in ("native", "reference"))
    exact = on("reference", grad.double(), x.double(), weight.double(), offsets, 0)
    for name, *values in zip(("y", "gradient of x", "gradient of weight"), actual, same_dtype, exact, strict=True):
        assert_within_budget(*values, name)


@needs_library
def test_native_ran() -> None:
    before = dispatch.calls.copy()
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, offsets = (t.detach() for t in make(6, [0, 2, 6], 3, 2))
        grouped_mm(x.to(dtype).requires_grad_(), weight.to(dtype), offsets).sum().backward()
    assert dispatch.calls - before == {("grouped_mm", "native"): 2, ("grouped_mm_backward", "native"): 2}


GOOD = {"x": torch.zeros(4, 3), "weight": torch.zeros(2, 3, 5), "offsets": torch.tensor([0, 1, 4])}


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"x": [1.0]}, TypeError, "x must be a Tensor of shape (M, K), not list"),
        ({"x": torch.zeros(4)}, ValueError, "x must have shape (M, K), not (4,)"),
        ({"x": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "x must be float32"),
        ({"weight": torch.zeros(2, 4, 5)}, ValueError, "weight must have shape (E, 3, P), not (2, 4, 5)"),
        ({"weight": torch.zeros(2, 3, 5).double()}, TypeError, "weight is torch.float64, but x is torch.float32"),
        ({"weight": torch.zeros(2, 3, 5, device="meta")}, ValueError, "weight is on meta, but x is on cpu"),
        ({"offsets": torch.tensor([0, 4])}, ValueError, "offsets must have shape (3,), not (2,)"),
        ({"offsets": torch.tensor([0.0, 1.0, 4.0])}, TypeError, "offsets must be int64 or int32"),
        ({"offsets": torch.tensor([0, 3, 2])}, ValueError, "offsets must ascend"),
        ({"offsets": torch.tensor([0, 3, 5])}, ValueError, "offsets must lie in [0, 5)"),
        ({"offsets": torch.tensor([-1, 3, 4])}, ValueError, "offsets must lie in [0, 5)"),
        ({"num_frozen": 3}, ValueError, "num_frozen must be from 0 to 2, the number of experts, not 3"),
        ({"num_frozen": -1}, ValueError, "num_frozen must be"),
        ({"num_frozen": 1.0}, TypeError, "num_frozen must be an int, not float"),
        ({"num_frozen": True}, TypeError, "num_frozen must be an int, not bool"),
    ],
)
def test_bad_input_is_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        grouped_mm(**{**GOOD, **bad})


class _Undefined(torch.autograd.Function):
    """The identity, whose backward returns an undefined gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_an_undefined_gradient_counts_as_zero() -> None:
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    (_Undefined.apply(grouped_mm(x, weight, torch.tensor([0, 2, 4]))) + x.sum()).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    torch.testing.assert_close(x.grad, torch.full((4, 3), 20.0))
