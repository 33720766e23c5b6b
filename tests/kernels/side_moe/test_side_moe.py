"""side_moe's values, gradients and counters against one expert after the other."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.error_budget import assert_within_budget
from tests.kernels.helpers.side_level import ACTIVATIONS, Level, make_level, naive, to
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, use_backend


def upstream(y: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(y.dtype)


def gradients(y: Tensor, inputs: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, upstream(y), allow_unused=True, materialize_grads=True)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    rows=st.sampled_from([0, 1, 2, 3, 5, 17]),
    dim=st.sampled_from([1, 3, 6, 11]),
    experts=st.integers(1, 33),
    rank=st.sampled_from([1, 3, 5]),
    one_row=st.booleans(),
    needed=st.tuples(*[st.booleans()] * 5),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    recompute=st.sampled_from([True, False, None]),
    weighted=st.booleans(),
    apart=st.booleans(),
    data=st.data(),
)
def test_equals_one_expert_after_the_other(
    rows: int,
    dim: int,
    experts: int,
    rank: int,
    one_row: bool,
    needed: tuple[bool, ...],
    activation: str,
    recompute: bool | None,
    weighted: bool,
    apart: bool,
    data: st.DataObject,
) -> None:
    num_frozen = data.draw(st.integers(0, experts), label="num_frozen")
    level = make_level(rows, dim, experts, rank, one_row=one_row, requires_grad=False)
    row_weight = torch.arange(rows, dtype=torch.float64) if weighted else None
    counters = Utilization(experts)
    options = {"activation": activation, "recompute": recompute, "utilization": counters, "row_weight": row_weight}
    if apart:
        options["frozen"] = FrozenExperts(level.down[:num_frozen], level.up[:num_frozen])
        arguments = level._replace(down=level.down[num_frozen:], up=level.up[num_frozen:])
    else:
        options["num_frozen"] = num_frozen
        arguments = level
    arguments = Level(*(t.clone().requires_grad_(need) for t, need in zip(arguments, needed, strict=True)))
    y = side_moe(*arguments, **options)

    for tensor in level:
        tensor.requires_grad_()
    expected_y, norm, gate = naive(*level, activation=activation, row_weight=row_weight)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(counters.norm, norm.detach())
    torch.testing.assert_close(counters.gate, gate.detach())

    assert y.requires_grad == any(needed)
    if not any(needed):
        return
    y.backward(upstream(y))
    expected = Level(*gradients(expected_y, level))
    if apart:
        expected = expected._replace(down=expected.down[num_frozen:], up=expected.up[num_frozen:])
    else:
        expected.down[:num_frozen] = 0
        expected.up[:num_frozen] = 0
    for argument, gradient, need in zip(arguments, expected, needed, strict=True):
        if need:
            torch.testing.assert_close(argument.grad, gradient)
        else:
            assert argument.grad is None
    if not apart:
        for argument in (arguments.down, arguments.up):
            assert argument.grad is None or not argument.grad[:num_frozen].any()


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_frozen", [0, 1, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_gradcheck(one_row: bool, recompute: bool, num_frozen: int, apart: bool) -> None:
    level = make_level(3, 4, 3, 2, one_row=one_row)
    frozen = FrozenExperts(level.down[:num_frozen], level.up[:num_frozen])
    row_weight = torch.tensor([2.0, 0.0, 301.0])

    def call(x: Tensor, backbone: Tensor, router: Tensor, down: Tensor, up: Tensor) -> Tensor:
        options: dict[str, Any] = {"frozen": frozen}
        if not apart:
            down, up = torch.cat((frozen.down, down)), torch.cat((frozen.up, up))
            options = {"num_frozen": num_frozen}
        counters = Utilization(3)
        return side_moe(
            x, backbone, router, down, up, utilization=counters, row_weight=row_weight, recompute=recompute, **options
        )

    trainable = [t[num_frozen:].detach().requires_grad_() for t in (level.down, level.up)]
    assert torch.autograd.gradcheck(call, (level.x, level.backbone, level.router, *trainable))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_stays_within_the_error_budget(dtype: torch.dtype, one_row: bool, recompute: bool) -> None:
    rows, experts = 67, 5
    level = make_level(rows, 50, experts, 13, one_row=one_row, dtype=dtype)
    counters = Utilization(experts)
    y = side_moe(*level, utilization=counters, recompute=recompute)
    results = dict(zip(Level._fields, gradients(y, level), strict=True))

    def oracle(level: Level) -> dict[str, Tensor]:
        y, norm, gate = naive(*level)
        named = dict(zip(Level._fields, gradients(y, level), strict=True))
        return {**named, "y": y, "norm": norm, "gate": gate}

    same_dtype, exact = oracle(level), oracle(to(level, torch.float64))
    for name, actual in {**results, "y": y}.items():
        assert_within_budget(actual, same_dtype[name], exact[name], name)
    assert_within_budget(counters.norm.float(), same_dtype["norm"], exact["norm"], "norm")
    assert_within_budget(counters.gate.float(), same_dtype["gate"], exact["gate"], "gate")


def test_experts_are_precise_when_the_backbone_gate_is_near_one() -> None:
    level = make_level(9, 8, 3, 4, dtype=torch.float32, requires_grad=False)
    level = level._replace(x=level.x.abs(), router=torch.zeros(4, 8), backbone=torch.zeros(9, 8))
    level.router[0] = 20 / level.x.sum(1).min()
    exact = naive(*to(level, torch.float64))[0]
    assert 0 < exact.norm() < 1e-6, "the experts' gates should sum to less than one float32 digit of 1"
    torch.testing.assert_close(side_moe(*level).double(), exact, rtol=1e-4, atol=0)


def test_any_strides_give_the_same() -> None:
    level = make_level(6, 5, 3, 4)
    expected = side_moe(*level)
    strided = Level(*(t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in level))
    assert not any(t.is_contiguous() for t in strided)
    y = side_moe(*strided)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous()
    up = upstream(y).T.contiguous().T
    for actual, wanted in zip(torch.autograd.grad(y, strided, up), gradients(expected, level), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_an_expanded_upstream_gradient_and_an_expanded_x() -> None:
    level = make_level(6, 5, 3, 4, one_row=True)
    broadcast = side_moe(level.x.expand(6, 5), *level[1:])
    torch.testing.assert_close(side_moe(*level), broadcast)
    actual = torch.autograd.grad(side_moe(*level).sum(), level)
    for gradient, wanted in zip(actual, torch.autograd.grad(broadcast.sum(), level), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("x_rows", [0, 1])
def test_no_rows(x_rows: int) -> None:
    level = make_level(0, 5, 3, 4, one_row=x_rows == 1)
    counters = Utilization(3)
    y = side_moe(*level, utilization=counters, row_weight=torch.empty(0))
    assert y.shape == (0, 5)
    y.sum().backward()
    for tensor in level:
        torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor))
    torch.testing.assert_close(counters.norm, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(counters.gate, torch.zeros(4, dtype=torch.float64))


def test_all_experts_frozen_apart() -> None:
    level = make_level(4, 5, 3, 4)
    frozen = FrozenExperts(level.down, level.up)
    none = level._replace(down=torch.empty(0, 4, 5, dtype=torch.float64), up=torch.empty(0, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(side_moe(*none, frozen=frozen), side_moe(*level), rtol=0, atol=0)


def test_frozen_experts_share_memory_and_have_no_gradient() -> None:
    level = make_level(4, 5, 3, 4)
    frozen = FrozenExperts(level.down, level.up)
    assert frozen.num_experts == 3
    assert frozen.down.data_ptr() == level.down.data_ptr()
    assert not frozen.down.requires_grad
    assert not frozen.up.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counters_do_not_change_the_result(dtype: torch.dtype) -> None:
    level = make_level(37, 50, 3, 13, dtype=dtype)
    with use_backend("reference"):
        expected = side_moe(*level)
        assert torch.equal(side_moe(*level, utilization=Utilization(3)), expected)
    # A kernel may add in another order where it counts.
    y = side_moe(*level, utilization=Utilization(3))
    assert_within_budget(y, expected, side_moe(*to(level, torch.float64)))


def test_counters_add_up_over_calls_and_in_place() -> None:
    level = make_level(9, 5, 3, 4)
    counters = Utilization(3)
    norm, gate = counters.norm, counters.gate
    for half in (slice(0, 4), slice(4, 9)):
        side_moe(level.x[half], level.backbone[half], *level[2:], utilization=counters)
    expected = naive(*level)
    torch.testing.assert_close(norm, expected[1].detach())
    torch.testing.assert_close(gate, expected[2].detach())
    assert counters.norm is norm
    assert counters.gate is gate


def test_row_weight_alone_counts_nothing_and_changes_nothing() -> None:
    level = make_level(9, 5, 3, 4)
    torch.testing.assert_close(side_moe(*level, row_weight=torch.rand(9)), side_moe(*level), rtol=0, atol=0)
