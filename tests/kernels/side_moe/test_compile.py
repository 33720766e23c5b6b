"""side_moe under opcheck, torch.compile, autocast and activation checkpointing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.side_level import Level, make_level, naive, to
from xsmoe_kernels import FrozenExperts, Utilization, side_moe


@pytest.mark.parametrize(
    ("one_row", "apart", "recompute"), [(False, False, False), (False, True, True), (True, True, False)]
)
def test_opcheck(one_row: bool, apart: bool, recompute: bool) -> None:
    dtype = torch.bfloat16 if recompute else torch.float32
    level = make_level(6, 5, 3, 4, one_row=one_row, dtype=dtype)
    apart_weights = (level.down.detach(), level.up.detach(), None) if apart else (None, None, None)
    if apart:
        level = level._replace(router=torch.randn(7, 5, dtype=dtype).requires_grad_())
    num_frozen = 0 if apart else 2
    forward = (*level, *apart_weights, torch.rand(6), num_frozen, recompute, apart, "gelu", "auto")
    torch.library.opcheck(torch.ops.xsmoe.side_moe.default, forward)

    _, gates, hidden, _, _ = torch.ops.xsmoe.side_moe(*forward)
    grad = torch.randn(5, 6, dtype=dtype).T
    inputs = [t.detach() for t in level]
    needed = (False, True, True, False, True) if one_row else (True,) * 5
    backward = (grad, *inputs, *apart_weights, gates, hidden, num_frozen, recompute, "gelu", *needed, "auto")
    torch.library.opcheck(torch.ops.xsmoe.side_moe_backward.default, backward)


def test_opcheck_of_the_counters() -> None:
    counters = Utilization(3)
    torch.library.opcheck(
        torch.ops.xsmoe.add_utilization.default, (counters.norm, counters.gate, torch.rand(4), torch.rand(4))
    )


def step(level: Level, counters: Utilization, **options: Any) -> Tensor:
    return side_moe(*level, utilization=counters, **options)


def check(function: Any, level: Level, calls: int = 1, **options: Any) -> None:
    """Check that `function` gives the value and gradients of `step`, and `calls` times the counters."""
    num_experts = level.router.shape[0] - 1
    counters, expected_counters = Utilization(num_experts), Utilization(num_experts)
    expected = step(level, expected_counters, **options)
    actual = function(level, counters, **options)
    torch.testing.assert_close(actual, expected)
    assert float(counters.gate.sum()) == pytest.approx(calls * float(expected_counters.gate.sum()))
    torch.testing.assert_close(counters.norm, calls * expected_counters.norm)
    wanted = torch.autograd.grad(expected.square().sum(), level)
    for gradient, want in zip(torch.autograd.grad(actual.square().sum(), level), wanted, strict=True):
        torch.testing.assert_close(gradient, want)
    # Backward may have recomputed the forward by now.
    torch.testing.assert_close(counters.norm, calls * expected_counters.norm)


def test_compiles_with_the_default_compiler() -> None:
    level = make_level(6, 5, 3, 4, dtype=torch.float32)
    check(compiled(step, backend="inductor"), level, row_weight=torch.rand(6))


def test_one_graph_runs_every_number_of_rows() -> None:
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    function = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    torch.compiler.reset()
    for rows in (6, 9, 17):
        check(function, make_level(rows, 5, 3, 4), num_frozen=1, recompute=True)
    assert len(graphs) == 1


@pytest.mark.parametrize("apart", [False, True])
def test_a_growing_bank_does_not_recompile_for_ever(apart: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(step, backend=counter)
    for experts in range(2, 12):
        level, options = make_level(6, 5, experts, 4), {"num_frozen": experts - 1}
        if apart:
            ahead = slice(None, experts - 1)
            options = {"frozen": FrozenExperts(level.down[ahead].clone(), level.up[ahead].clone())}
            level = level._replace(down=level.down[-1:].detach(), up=level.up[-1:].detach())
        function(level, Utilization(experts), recompute=True, **options)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("one_row", [False, True])
def test_compiles_for_a_number_of_rows_that_the_data_decide(one_row: bool) -> None:
    function = compiled(step)
    level = make_level(6, 5, 3, 4, one_row=one_row)
    for tensor in level[one_row:2]:
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    check(function, level)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_for_rows_that_a_mask_picks() -> None:
    level = make_level(6, 5, 3, 4)

    def masked(mask: Tensor, counters: Utilization) -> Tensor:
        return side_moe(level.x[mask], level.backbone[mask], *level[2:], utilization=counters)

    function = compiled(masked)
    for mask in (torch.arange(6) > 1, torch.zeros(6, dtype=torch.bool)):
        counters, expected = Utilization(3), Utilization(3)
        y = function(mask, counters)
        torch.testing.assert_close(y, masked(mask, expected))
        torch.testing.assert_close(counters.norm, expected.norm)
        for gradient, want in zip(
            torch.autograd.grad(y.sum(), level), torch.autograd.grad(masked(mask, expected).sum(), level), strict=True
        ):
            torch.testing.assert_close(gradient, want)


def test_compiles_with_frozen_experts_and_autocast() -> None:
    level = make_level(6, 5, 4, 4, dtype=torch.float32)
    frozen = FrozenExperts(level.down[:3].clone(), level.up[:3].clone())
    level = Level(*(t.detach().requires_grad_() for t in level._replace(down=level.down[3:], up=level.up[3:])))

    def under_autocast(level: Level, counters: Utilization, frozen: FrozenExperts) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return step(level, counters, frozen=frozen)

    counters, expected = Utilization(4), Utilization(4)
    y = compiled(under_autocast)(level, counters, frozen)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, under_autocast(level, expected, frozen), rtol=0, atol=0)
    torch.testing.assert_close(counters.norm, expected.norm)


def test_autocast_casts_the_operands_and_leaves_the_rest_as_it_was() -> None:
    level = make_level(6, 5, 3, 4, dtype=torch.float32)
    narrow = to(level, torch.bfloat16)
    expected = step(narrow, expected_counters := Utilization(3))
    counters = Utilization(3)
    with torch.autocast("cpu", torch.bfloat16):
        y = step(level, counters)
        # Inside of autocast, so that a cast of the backward operator's own products would show.
        gradients = torch.autograd.grad(y.float().square().sum(), level)
    assert torch.equal(y, expected)
    assert y.dtype == torch.bfloat16
    assert torch.equal(counters.norm, expected_counters.norm)
    for gradient, want in zip(gradients, torch.autograd.grad(expected.float().square().sum(), narrow), strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, want.float())


def test_autocast_keeps_gates_and_norms_in_float32() -> None:
    level = make_level(6, 5, 3, 4, dtype=torch.bfloat16, requires_grad=False)
    counters = Utilization(3)
    with torch.autocast("cpu", torch.bfloat16):
        step(level, counters)
    # The products' operands are bfloat16 already, so that only a softmax or a norm in bfloat16 could differ so much.
    torch.testing.assert_close(counters.gate, naive(*to(level, torch.float64))[2], rtol=1e-5, atol=0)


def test_autocast_leaves_row_weight_exact() -> None:
    level = make_level(2, 5, 3, 4, dtype=torch.float32)
    counters = Utilization(3)
    with torch.autocast("cpu", torch.bfloat16):
        step(level, counters, row_weight=torch.tensor([301.0, 0.0]))
    assert float(counters.gate.sum()) == pytest.approx(301, rel=1e-6), "bfloat16 would have made it 302"


def test_autocast_accepts_mixed_operands_but_not_float64() -> None:
    level = make_level(2, 5, 3, 4, dtype=torch.float32)
    mixed = level._replace(backbone=level.backbone.detach().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert side_moe(*mixed).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"backbone is torch.float64, but x is torch.bfloat16"):
            side_moe(*level._replace(backbone=level.backbone.double()))
        assert side_moe(*to(level, torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inner", ["eager", "compiled"])
def test_checkpointing_counts_once(use_reentrant: bool, inner: str) -> None:
    function = compiled(step) if inner == "compiled" else step
    runs = 0

    def counted(*tensors: Tensor, counters: Utilization) -> Tensor:
        nonlocal runs
        runs += 1
        return function(Level(*tensors), counters)

    def checkpointed(level: Level, counters: Utilization) -> Tensor:
        # Reentrant checkpoints do not support keyword arguments.
        return checkpoint(lambda *tensors: counted(*tensors, counters=counters), *level, use_reentrant=use_reentrant)

    if use_reentrant:
        # They work with backward alone, not with grad.
        level = make_level(6, 5, 3, 4)
        counters, expected = Utilization(3), Utilization(3)
        step(level, expected).square().sum().backward()
        wanted = [t.grad.clone() for t in level]
        for tensor in level:
            tensor.grad = None
        checkpointed(level, counters).square().sum().backward()
        for tensor, want in zip(level, wanted, strict=True):
            torch.testing.assert_close(tensor.grad, want)
        torch.testing.assert_close(counters.norm, expected.norm)
        torch.testing.assert_close(counters.gate, expected.gate)
    else:
        check(checkpointed, make_level(6, 5, 3, 4))
    assert runs == 2, "the checkpoint ran the forward again"


def test_a_checkpoint_inside_a_compiled_function_counts_once() -> None:
    def function(level: Level, counters: Utilization) -> Tensor:
        return checkpoint(step, level, counters, use_reentrant=False)

    check(compiled(function), make_level(6, 5, 3, 4))
