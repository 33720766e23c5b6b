"""route_topk against a loop over rows, and its gradients."""

import functools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.compilation import compiled, unbacked
from tests.kernels.helpers.error_budget import assert_within_budget
from tests.kernels.helpers.native_library import needs_library
from xsmoe_kernels.ops.route_topk import Routing, route_topk
from xsmoe_kernels.runtime import dispatch


def loop(logits: Tensor, k: int, renormalize: bool = True) -> tuple[list[list[float]], list[list[int]]]:
    """Compute gates and experts row by row, in Python floats."""
    all_gates, all_experts = [], []
    for row in logits.tolist():
        largest = max(row)
        weights = [math.exp(value - largest) for value in row]
        experts = sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:k]
        total = sum(weights[e] for e in experts) if renormalize else sum(weights)
        all_gates.append([weights[e] / total for e in experts])
        all_experts.append(experts)
    return all_gates, all_experts


def assert_sorted_by_expert(routing: Routing, num_experts: int) -> None:
    flat = routing.experts.flatten().tolist()
    assert routing.order.tolist() == sorted(range(len(flat)), key=lambda i: (flat[i], i))
    assert routing.offsets.tolist() == [sum(e < bound for e in flat) for bound in range(num_experts + 1)]


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    num_rows, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 33))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Few distinct values, so that most rows hold ties.
    logits = torch.randint(-3, 4, (num_rows, num_experts), generator=generator).double() / 2
    return logits, draw(st.integers(1, num_experts))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(routings(), st.booleans())
def test_equals_a_loop_over_rows(case: tuple[Tensor, int], renormalize: bool) -> None:
    logits, k = case
    routing = route_topk(logits, k, renormalize=renormalize)
    gates, experts = loop(logits, k, renormalize)
    assert routing.experts.tolist() == experts
    torch.testing.assert_close(routing.gates, torch.tensor(gates, dtype=torch.float64).reshape(-1, k))
    assert_sorted_by_expert(routing, logits.shape[1])


def test_ties_go_to_the_lower_expert() -> None:
    routing = route_topk(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5]), 4)
    assert routing.experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_one_expert_gets_every_row() -> None:
    routing = route_topk(torch.randn(3, 1), 1)
    assert routing.gates.tolist() == [[1.0]] * 3
    assert routing.offsets.tolist() == [0, 3]


def test_k_of_all_experts_gives_the_full_softmax() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    for renormalize in (True, False):
        routing = route_topk(logits, 6, renormalize=renormalize)
        torch.testing.assert_close(routing.gates, logits.softmax(1).gather(1, routing.experts))


def test_no_rows() -> None:
    logits = torch.randn(0, 5, requires_grad=True)
    routing = route_topk(logits, 2)
    assert [tuple(t.shape) for t in routing] == [(0, 2), (0, 2), (0,), (6,)]
    assert routing.offsets.tolist() == [0] * 6
    routing.gates.sum().backward()
    assert logits.grad is not None


def test_probabilities_that_underflow_still_rank_and_renormalize() -> None:
    logits = torch.tensor([[0.0, -300.0, -200.0, -400.0]])
    routing = route_topk(logits, 3)
    assert routing.experts.tolist() == [[0, 2, 1]]
    # Both probabilities of the second and third place are 0 in float32: over those two alone the gates still sum to 1.
    assert route_topk(logits[:, 1:], 2).gates.sum() == 1


def test_the_places_of_each_expert_are_found_by_order_and_offsets() -> None:
    routing = route_topk(torch.randn(20, 4), 2)
    for expert in range(4):
        places = routing.order[routing.offsets[expert] : routing.offsets[expert + 1]]
        assert (routing.experts.flatten()[places] == expert).all()
        rows = (places // 2).tolist()
        assert rows == [n for n in range(20) if expert in routing.experts[n].tolist()]


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradcheck(renormalize: bool) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: route_topk(x, 2, renormalize=renormalize).gates, logits)


def test_only_the_gates_are_differentiable() -> None:
    routing = route_topk(torch.randn(3, 4, requires_grad=True), 2)
    assert [t.requires_grad for t in routing] == [True, False, False, False]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget(dtype: torch.dtype, renormalize: bool) -> None:
    def plain(logits: Tensor) -> Tensor:
        gates, _ = logits.softmax(1).topk(3)
        return gates / gates.sum(1, keepdim=True) if renormalize else gates

    # Distinct in bfloat16 too, so that the choice of experts is the same in every dtype.
    logits = torch.stack([torch.randperm(16) for _ in range(50)]).to(dtype) / 4
    grad = torch.randn(50, 3).to(dtype)
    results = []
    for function, x in (
        (lambda t: route_topk(t, 3, renormalize=renormalize).gates, logits.clone()),
        (plain, logits.clone()),
        (plain, logits.double()),
    ):
        x.requires_grad_()
        gates = function(x)
        results.append((gates, *torch.autograd.grad(gates, x, grad.to(gates.dtype))))
    for name, values in zip(("gates", "gradient"), zip(*results, strict=True), strict=True):
        assert_within_budget(*values, name)


@pytest.mark.parametrize("renormalize", [True, False])
def test_opcheck(renormalize: bool) -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.xsmoe.route_topk, (logits, 2, renormalize, "auto"))
    experts = route_topk(logits, 2).experts
    grad = torch.randn(6, 2)
    torch.library.opcheck(torch.ops.xsmoe.route_topk_backward, (grad, logits.detach(), experts, renormalize, "auto"))


def test_compiles_to_one_graph_with_unknown_sizes() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    weight = torch.arange(12.0).view(6, 2)
    unbacked(logits)
    routing = compiled(route_topk)(logits, 2)
    (grad,) = torch.autograd.grad((routing.gates * weight).sum(), logits)
    expected = route_topk(logits, 2)
    for actual, wanted in zip(routing, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(grad, *torch.autograd.grad((expected.gates * weight).sum(), logits))


def test_autocast_leaves_the_logits_alone() -> None:
    logits = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        routing = route_topk(logits, 2)
    torch.testing.assert_close(routing.gates, route_topk(logits, 2).gates, rtol=0, atol=0)


def test_logits_may_be_strided() -> None:
    logits = torch.randn(5, 7)[:, ::2].T
    torch.testing.assert_close(tuple(route_topk(logits, 2)), tuple(route_topk(logits.contiguous(), 2)))


def test_the_reference_ran() -> None:
    before = dispatch.calls.copy()
    with dispatch.use_backend("reference"):
        gates = route_topk(torch.randn(3, 4, requires_grad=True), 2).gates
    gates.sum().backward()
    ran = dispatch.calls - before
    assert ran == {("route_topk", "reference"): 1, ("route_topk_backward", "reference"): 1}


def on(backend: str, logits: Tensor, k: int, renormalize: bool, grad: Tensor) -> tuple[Routing, Tensor]:
    """Return the routing and the gradient of the logits for an upstream gradient of the gates."""
    logits = logits.detach().requires_grad_()
    with dispatch.use_backend(backend):
        routing = route_topk(logits, k, renormalize=renormalize)
    (grad_logits,) = torch.autograd.grad(routing.gates, logits, grad.to(logits.dtype))
    return routing, grad_logits


def assert_native_agrees(logits: Tensor, k: int, renormalize: bool, grad: Tensor) -> None:
    """Check that choices equal the reference's, and that gates and gradients are within the error budget."""
    native, *others = (
        on(backend, x, k, renormalize, grad)
        for backend, x in (("native", logits), ("reference", logits), ("reference", logits.double()))
    )
    results = [(routing.gates, gradient) for routing, gradient in (native, *others)]
    choices = zip(native[0][1:], others[0][0][1:], strict=True)
    for name, values in zip(("experts", "order", "offsets"), choices, strict=True):
        assert torch.equal(*values), name
    for name, (actual, same_dtype, exact) in zip(("gates", "gradient"), zip(*results, strict=True), strict=True):
        assert torch.equal(actual.isnan(), same_dtype.isnan()), name
        assert_within_budget(actual.nan_to_num(), same_dtype.nan_to_num(), exact.nan_to_num(), name)


def random_logits(num_rows: int, num_experts: int, dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_experts, generator=generator).to(dtype)
    if kind == "ties":
        return logits.round()
    if kind == "special":
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0], dtype=dtype)
        place = torch.rand(num_rows, num_experts, generator=generator)
        special = values[torch.randint(6, (num_rows, num_experts), generator=generator)]
        return torch.where(place < 0.2, special, logits)
    if kind == "strided":
        return torch.randn(num_experts, 2 * num_rows, generator=generator).to(dtype)[:, ::2].T
    return logits


@needs_library
@settings(deadline=None, derandomize=True, max_examples=120)
@given(
    # One past the rows that are routed together, and several times as many.
    num_rows=st.sampled_from([0, 1, 2, 4, 5, 8, 9, 16, 17, 50]),
    num_experts=st.integers(1, 33),
    share=st.floats(0, 1),
    renormalize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from(["plain", "ties", "special", "strided"]),
    seed=st.integers(0, 100),
)
def test_native_equals_the_reference(
    num_rows: int, num_experts: int, share: float, renormalize: bool, dtype: torch.dtype, kind: str, seed: int
) -> None:
    k = max(1, round(share * num_experts))
    logits = random_logits(num_rows, num_experts, dtype, kind, seed)
    grad = torch.randn(k, num_rows, generator=torch.Generator().manual_seed(seed)).T
    assert_native_agrees(logits, k, renormalize, grad)


@needs_library
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("kind", ["plain", "special"])
@pytest.mark.parametrize("num_experts, k", [(1000, 1), (1000, 8), (1000, 700), (2500, 2500)])
def test_native_supports_thousands_of_experts(num_experts: int, k: int, kind: str, renormalize: bool) -> None:
    logits = random_logits(21, num_experts, torch.float32, kind, 0)
    assert_native_agrees(logits, k, renormalize, torch.randn(21, k, generator=torch.Generator().manual_seed(0)))


@needs_library
def test_native_ranks_nan_first_and_both_zeros_alike() -> None:
    logits = torch.tensor([[1.0, torch.nan, torch.inf, -torch.nan, 2.0], [-0.0, 0.0, -0.0, -1.0, -torch.inf]])
    with dispatch.use_backend("native"):
        assert route_topk(logits, 5).experts.tolist() == [[1, 3, 2, 4, 0], [0, 1, 2, 3, 4]]


@needs_library
@pytest.mark.parametrize("renormalize", [True, False])
def test_native_is_deterministic_for_any_number_of_threads(renormalize: bool) -> None:
    logits, grad = torch.randn(3000, 21), torch.randn(3000, 4)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 1, 2, 3, 7):
            torch.set_num_threads(number)
            routing, gradient = on("native", logits, 4, renormalize, grad)
            results.append((*routing, gradient))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_native_ran() -> None:
    before = dispatch.calls.copy()
    for dtype in (torch.float32, torch.bfloat16):
        route_topk(torch.randn(3, 4, dtype=dtype, requires_grad=True), 2).gates.sum().backward()
    assert dispatch.calls - before == {("route_topk", "native"): 2, ("route_topk_backward", "native"): 2}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([[1.0]], 1), TypeError, "logits must be a Tensor of shape (N, E), not list"),
        ((torch.zeros(3), 1), ValueError, "logits must have shape (N, E), not (3,)"),
        ((torch.zeros(3, 2, dtype=torch.int64), 1), TypeError, "logits must be float32"),
        ((torch.zeros(3, 2), 3), ValueError, "k must be from 1 to 2, the number of experts, not 3"),
        ((torch.zeros(3, 2), 0), ValueError, "k must be"),
        ((torch.zeros(3, 2), 1.0), TypeError, "k must be an int, not float"),
        ((torch.zeros(3, 2), True), TypeError, "k must be an int, not bool"),
        ((torch.zeros(3, 0), 1), ValueError, "k must be"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        functools.partial(route_topk, *arguments)()


def test_renormalize_that_is_no_bool_is_named() -> None:
    with pytest.raises(TypeError, match="renormalize must be True or False, not int"):
        route_topk(torch.zeros(3, 2), 1, renormalize=1)  # type: ignore[arg-type]
