"""The native kernels of side_moe against float64, within the error budget."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.native_library import needs_library
from tests.kernels.helpers.native_side_moe import SELECTION, Call, check, native_results, oracle, results
from tests.kernels.helpers.side_level import ACTIVATIONS, Level, make_level, to
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, use_backend

pytestmark = needs_library

DTYPES = (torch.float32, torch.bfloat16)
SUBSETS = [subset for subset in itertools.product((False, True), repeat=5) if any(subset)]


def plain_level(*shape: int, dtype: torch.dtype, one_row: bool = False, seed: int = 0) -> Level:
    """Return a level without gradients."""
    return make_level(*shape, dtype=dtype, one_row=one_row, seed=seed, requires_grad=False)


@settings(deadline=None, derandomize=True, max_examples=250)
@given(
    # One past a tile of rows, whose height depends on the instruction set level and the dtype, and several tiles.
    rows=st.sampled_from([0, 1, 2, 5, 31, 33, 128, 129, 140, 141, 144, 145, 300, 433]),
    dim=st.sampled_from([0, 1, 3, 7, 17, 33, 48, 64, 100, 768]),
    experts=st.integers(1, 33),
    rank=st.sampled_from([0, 1, 3, 7, 17, 33, 48, 64, 100]),
    one_row=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    call=st.builds(
        Call,
        num_frozen=st.integers(0, 33),
        apart=st.booleans(),
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        recompute=st.sampled_from([True, False, None]),
        counted=st.booleans(),
        weighted=st.booleans(),
        needed=st.tuples(*[st.booleans()] * 5),
    ),
)
@example(rows=283, dim=768, experts=10, rank=64, one_row=False, dtype=torch.float32, call=Call(num_frozen=9))
@example(rows=257, dim=768, experts=10, rank=64, one_row=False, dtype=torch.bfloat16, call=Call(num_frozen=9))
@example(rows=3, dim=0, experts=5, rank=3, one_row=False, dtype=torch.float32, call=Call(num_frozen=0))
@example(rows=3, dim=5, experts=2, rank=0, one_row=True, dtype=torch.bfloat16, call=Call(num_frozen=1))
def test_stays_within_the_error_budget(
    rows: int, dim: int, experts: int, rank: int, one_row: bool, dtype: torch.dtype, call: Call
) -> None:
    assume(rows * dim * experts * rank <= 2e8)
    call = call._replace(num_frozen=min(call.num_frozen, experts))
    check(plain_level(rows, dim, experts, rank, one_row=one_row, dtype=dtype), call)


@pytest.mark.parametrize("place", range(len(SELECTION)))
def test_selected_cases_on_the_best_instruction_set(place: int) -> None:
    check(*SELECTION[place])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_subset_of_gradients(dtype: torch.dtype, one_row: bool, recompute: bool) -> None:
    level = plain_level(145, 33, 3, 17, one_row=one_row, dtype=dtype)
    call = Call(num_frozen=1, recompute=recompute)
    expected = oracle(level, call)
    for needed in SUBSETS:
        check(level, call._replace(needed=needed), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_every_subset_of_gradients_of_few_rows_and_no_trainable_expert(dtype: torch.dtype, rows: int) -> None:
    level = plain_level(rows, 17, 2, 5, one_row=rows == 5, dtype=dtype)
    for apart in (False, True):
        call = Call(num_frozen=2, apart=apart)
        expected = oracle(level, call)
        for needed in SUBSETS:
            check(level, call._replace(needed=needed), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [False, True])
def test_every_number_of_frozen_experts(dtype: torch.dtype, apart: bool) -> None:
    experts = 7
    level = plain_level(67, 50, experts, 13, dtype=dtype)
    for num_frozen in range(experts + 1):
        found = check(level, Call(num_frozen=num_frozen, apart=apart))
        trained = found["gradient of down"]
        assert len(trained) == (experts - num_frozen if apart else experts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 300])
def test_one_row_of_x_for_any_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    for counted, weighted in ((True, True), (True, False), (False, False)):
        level = plain_level(rows, 33, 4, 9, one_row=True, dtype=dtype)
        check(level, Call(num_frozen=2, counted=counted, weighted=weighted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counted", [False, True])
def test_recomputation_changes_only_the_gradients(dtype: torch.dtype, counted: bool) -> None:
    level = plain_level(67, 50, 5, 13, dtype=dtype)
    kept, again, chosen = (native_results(level, Call(counted=counted, recompute=r)) for r in (False, True, None))
    for name in kept:
        if not name.startswith("gradient"):
            assert torch.equal(kept[name], again[name]), name
        # 5 * 13 columns are at most twice as wide as x.
        assert torch.equal(kept[name], chosen[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_counters_stay_exact_over_many_rows(dtype: torch.dtype) -> None:
    level = plain_level(20_000, 24, 2, 4, dtype=dtype)
    call = Call(weighted=True, needed=(False,) * 5)
    found, (_, exact) = native_results(level, call), oracle(level, call)
    torch.testing.assert_close(found["gate"].double(), exact["gate"], rtol=1e-6, atol=0)
    # Experts' outputs come from activations in bfloat16, whose roundings cancel out in part.
    torch.testing.assert_close(
        found["norm"].double(), exact["norm"], rtol=max(1e-6, torch.finfo(dtype).eps / 500), atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_row", [False, True])
def test_the_same_bits_again(dtype: torch.dtype, one_row: bool) -> None:
    level = plain_level(300, 50, 5, 13, one_row=one_row, dtype=dtype)
    call = Call(num_frozen=2, apart=True, weighted=True)
    first, second = native_results(level, call), native_results(level, call)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# Layouts.


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def every_other(tensor: Tensor) -> Tensor:
    """Return the same numbers as every second row of wider rows, from the second column on."""
    larger = tensor.new_full((2 * len(tensor), *tensor.shape[1:-1], tensor.shape[-1] + 3), float("nan"))
    view = larger[::2, ..., 1:-2]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("layout", [transposed, every_other])
@pytest.mark.parametrize("dim", [33, 64])
def test_any_strides_give_the_same_bits(
    dtype: torch.dtype, one_row: bool, layout: Callable[[Tensor], Tensor], dim: int
) -> None:
    level = plain_level(145, dim, 3, 5, one_row=one_row, dtype=dtype)
    upstream = torch.randn(145, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    frozen = FrozenExperts(level.down[:1].clone(), level.up[:1].clone())
    strided_frozen = FrozenExperts(layout(level.down[:1]), layout(level.up[:1]))
    trained = level._replace(down=level.down[1:], up=level.up[1:])
    expected = call_with(trained, upstream, frozen)
    actual = call_with(Level(*map(layout, trained)), layout(upstream), strided_frozen)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def call_with(level: Level, upstream: Tensor, frozen: FrozenExperts | None) -> dict[str, Tensor]:
    """Return y, counters and all gradients of the native kernels."""
    level = Level(*(t.detach().requires_grad_() for t in level))
    counters = Utilization(len(level.router) - 1)
    with use_backend("native"):
        y = side_moe(*level, frozen=frozen, utilization=counters)
    gradients = torch.autograd.grad(y, level, upstream)
    return {"y": y, "norm": counters.norm, **dict(zip(Level._fields, gradients, strict=True))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [33, 64])
def test_expanded_inputs_and_gradients(dtype: torch.dtype, dim: int) -> None:
    """Expanded rows, and an upstream gradient expanded from one number."""
    rows = 145
    level = plain_level(rows, dim, 3, 5, dtype=dtype)
    level = level._replace(x=level.x[:1].expand(rows, dim), backbone=level.backbone[:1].expand(rows, dim))
    upstream = torch.ones((), dtype=dtype).expand(rows, dim)
    dense = Level(*(t.contiguous() for t in level))
    expected = call_with(dense, upstream.contiguous(), None)
    for name, value in call_with(level, upstream, None).items():
        assert torch.equal(value, expected[name]), name


def test_a_view_deep_inside_of_another_tensor() -> None:
    """Levels of a hidden-state store are slices of (N, levels, D), and a modality's columns are part of wider rows."""
    level = plain_level(145, 48, 3, 5, dtype=torch.bfloat16)
    store = torch.full((145, 3, 50), float("nan"), dtype=torch.bfloat16)
    store[:, 0, 1:49], store[:, 2, 1:49] = level.x, level.backbone
    views = level._replace(x=store[:, 0, 1:49], backbone=store[:, 2, 1:49])
    upstream = torch.randn(145, 48).bfloat16()
    expected = call_with(level, upstream, None)
    for name, value in call_with(views, upstream, None).items():
        assert torch.equal(value, expected[name]), name


# Activations, number by number: x = (v, 0), down = (1, 0), up = (0, 1) and equal gates give y = (.., a(v) / 2).


def probe(activation: str, values: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return the activation and its derivative at the values."""
    x = torch.stack((values, torch.zeros_like(values)), dim=1).requires_grad_()
    one, other = (torch.tensor([[pair]], dtype=values.dtype) for pair in ((1.0, 0.0), (0.0, 1.0)))
    with use_backend(backend):
        y = side_moe(x, torch.zeros_like(x), torch.zeros(2, 2, dtype=values.dtype), one, other, activation=activation)
    (dx,) = torch.autograd.grad(y, x, torch.tensor([[0.0, 1.0]], dtype=values.dtype).expand_as(y))
    return 2 * y[:, 1].detach(), 2 * dx[:, 0]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_an_activation_and_its_slope_at_every_size_of_its_argument(activation: str) -> None:
    far = torch.logspace(-30, 15, 400)
    values = torch.cat((torch.linspace(-14, 14, 40_001), far, -far))
    (value, slope), (exact, exact_slope) = (
        probe(activation, values.to(dtype), backend)
        for dtype, backend in ((torch.float32, "native"), (torch.float64, "reference"))
    )
    eps = torch.finfo(torch.float32).eps
    # As exact as torch's own kernels in float32, in all but the tails.
    assert float(((value.double() - exact).abs() / (1 + exact.abs())).max()) <= 8 * eps
    assert float((slope.double() - exact_slope).abs().max()) <= 8 * eps


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e20, -1e20])
def test_hidden_states_that_are_huge_or_not_finite(activation: str, value: float) -> None:
    """The result of an infinity may be infinite or NaN: torch's own kernels disagree about it."""
    level = plain_level(5, 3, 1, 1, dtype=torch.float32)
    level = level._replace(
        x=torch.ones(5, 3), down=torch.tensor([[[value, 0.0, 0.0]]]), up=torch.ones(1, 1, 3), router=torch.zeros(2, 3)
    )
    call = Call(activation=activation, needed=(False,) * 5)
    actual, expected = (results(level, call, backend, torch.float32) for backend in ("native", "reference"))
    for name, found in actual.items():
        assert torch.equal(found.isfinite(), expected[name].isfinite()), name
        if abs(value) == 1e20:
            torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("field", range(5))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_spread_as_in_the_reference(dtype: torch.dtype, field: int, value: float) -> None:
    """One such number in one input affects the same results as in the reference."""
    level = plain_level(145, 33, 3, 5, dtype=dtype)
    level[field].view(-1)[40] = value
    # In float32: where torch multiplies bfloat16 on AMX, a NaN in a row of odd width also reaches the row before it.
    wide = to(level, torch.float32)
    for call in (Call(num_frozen=1), Call(num_frozen=1, recompute=True, counted=False)):
        actual, expected = results(level, call, "native", dtype), results(wide, call, "reference", dtype)
        for name, found in actual.items():
            assert torch.equal(found.isfinite(), expected[name].isfinite()), name


def test_infinite_upstream_gradients_stay_in_their_row() -> None:
    level = Level(*(t.requires_grad_() for t in plain_level(145, 33, 3, 5, dtype=torch.float32)))
    upstream = torch.ones(145, 33)
    upstream[77, 5] = float("inf")
    with use_backend("native"):
        y = side_moe(*level)
    dx, dbackbone = torch.autograd.grad(y, level[:2], upstream)
    assert not dx[77].isfinite().any()
    assert dbackbone[77].isinf().sum() == 1
    for gradient in (dx, dbackbone):
        assert gradient[:77].isfinite().all()
        assert gradient[78:].isfinite().all()


def test_no_rows_count_nothing_even_where_the_row_is_not_finite() -> None:
    level = plain_level(0, 5, 2, 3, dtype=torch.float32, one_row=True)
    utilization = Utilization(2)
    with use_backend("native"):
        side_moe(torch.full((1, 5), torch.inf), *level[1:], utilization=utilization)
    assert utilization.norm.tolist() == utilization.gate.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 20.0, 80.0])
def test_logits_far_from_zero(dtype: torch.dtype, scale: float) -> None:
    # Few rows, those with two large logits that are nearly equal, make most of the error: so many rows and draws.
    level = plain_level(1000, 48, 5, 13, dtype=dtype)
    level = level._replace(router=(level.router.double() * scale).to(dtype))
    logits = level.x.double() @ level.router.double().T
    assert scale < 80 or logits.abs().max() > 150
    for call in (Call(), Call(counted=False, recompute=True)):
        check(level, call, draws=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e3])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_hidden_states_far_from_unit_scale(dtype: torch.dtype, scale: float, activation: str) -> None:
    level = plain_level(67, 48, 5, 13, dtype=dtype)
    check(level._replace(down=(level.down.double() * scale).to(dtype)), Call(activation=activation, num_frozen=2))


def test_experts_are_precise_when_the_backbone_gate_is_near_one() -> None:
    level = plain_level(9, 8, 3, 4, dtype=torch.float32)
    level = level._replace(x=level.x.abs(), router=torch.zeros(4, 8), backbone=torch.zeros(9, 8))
    level.router[0] = 20 / level.x.sum(1).min()
    check(level, Call())
