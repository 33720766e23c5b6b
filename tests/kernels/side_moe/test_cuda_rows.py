"""The CUDA row kernels of side_moe separately: gates, counters, gradients of logits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.cuda_library import DEVICE, ON_GPU
from tests.kernels.helpers.triton_gpu import DTYPES, spread
from xsmoe_kernels.runtime import dispatch

_reason = dispatch.unavailable_reason("side_moe", "cuda", DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(_reason is not None, reason=_reason or "")

# rows, dim, gated; past a warp's rows, 16 bytes, a warp's columns, 16 gates, 32 gates.
SHAPES = [(0, 16, 2), (1, 1, 2), (3, 9, 11), (9, 24, 16), (33, 40, 17), (6, 300, 34), (2, 8, 301)]
REAL_SHAPES = [(2816, 768, 11), (65537, 768, 33)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def assert_near(found: Tensor, exact: Tensor, terms: int) -> None:
    """Return the tolerance of float32 sums of this many numbers."""
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    if exact.numel():
        bound = 4 * torch.finfo(torch.float32).eps * (1 + terms**0.5) * max(float(exact.abs().max()), 1e-3)
        assert float((found.double() - exact).abs().max()) <= bound


def gates_of(*levels: tuple[Tensor, Tensor]) -> list[Tensor]:
    xs, routers = map(list, zip(*levels, strict=True))
    gates: list[Tensor] = torch.ops.xsmoe_cuda.side_moe_gate(xs, routers)
    return gates


def exact_gates(x: Tensor, router: Tensor) -> Tensor:
    return torch.softmax(x.double() @ router.double().T, dim=-1)


def routed(rows: int, dim: int, gated: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(rows, dim, dtype=dtype, seed=seed), normal(gated, dim, dtype=dtype, seed=seed + 1, scale=dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim", "gated"), SHAPES + REAL_SHAPES * ON_GPU)
def test_gates(rows: int, dim: int, gated: int, dtype: torch.dtype) -> None:
    x, router = routed(rows, dim, gated, dtype)
    (gates,) = gates_of((x, router))
    assert_near(gates, exact_gates(x, router), dim)


@settings(max_examples=200 if ON_GPU else 25, deadline=None, derandomize=True)
@given(data=st.data())
def test_gates_of_any_levels(data: st.DataObject) -> None:
    """Each level is bitwise equal to the level alone in a dense layout."""
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    levels, expected = [], []
    for seed in range(data.draw(st.integers(1, 8), "levels")):
        rows, dim = data.draw(st.integers(0, 9), "rows"), data.draw(st.integers(1, 40), "dim")
        x, router = routed(rows, dim, data.draw(st.integers(2, 34), "gated"), dtype, seed)
        expected += gates_of((x, router))
        step, shift = data.draw(st.integers(0, 9), "gap"), data.draw(st.integers(0, 9), "offset")
        wide = x.new_full((rows * (dim + step) + shift,), float("nan"))
        placed = wide[shift:].view(rows, dim + step)[:, :dim] if rows else x
        levels.append((placed.copy_(x), router))
    for (x, router), found, alone in zip(levels, gates_of(*levels), expected, strict=True):
        assert torch.equal(found, alone)
        assert_near(found, exact_gates(x, router), x.shape[1])


@pytest.mark.parametrize("gated", [3, 40])
def test_gates_of_logits_that_are_not_finite(gated: int) -> None:
    x, router = routed(4, 16, gated, torch.float32)
    infinite = float("inf")
    x[0], router[1] = x[0].abs() + 0.1, -infinite  # in row 0 gate 1 has no share, in others it may have all
    x[1, 0], router[0, 0] = float("nan"), 1.0
    with_all = router.clone()
    with_all[:] = -infinite
    for weights in (router, with_all):
        (gates,) = gates_of((x, weights))
        torch.testing.assert_close(gates, exact_gates(x, weights).float(), equal_nan=True)
    (gates,) = gates_of((x, router))
    assert gates[0, 1] == 0
    assert gates[0].isfinite().all()
    assert gates[1].isnan().all()


def counted(rows: int, gated: int, blocks: int, one_row: bool, weighted: bool, seed: int = 0) -> tuple[Any, ...]:
    """Return gates, squares, backbone_squares or None, row_weight or None."""
    own = 1 if one_row else rows
    gates = torch.softmax(normal(own, gated, seed=seed), -1)
    squares = normal(gated, blocks, own, seed=seed + 1).square()
    if one_row:
        squares[0] = float("nan")  # which is the backbone's, and written elsewhere
    backbone = normal(rows, seed=seed + 2).square() if one_row else None
    return gates, squares, backbone, normal(rows, seed=seed + 3).abs() if weighted else None


def counts(*levels: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    gates, squares, backbone, weight = map(list, zip(*levels, strict=True))
    found = torch.ops.xsmoe_cuda.side_moe_count(gates, squares, backbone if backbone[0] is not None else [], weight)
    return list(zip(*found, strict=True))


def exact_counts(gates: Tensor, squares: Tensor, backbone: Tensor | None, weight: Tensor | None) -> tuple[Tensor, ...]:
    norms = squares.double().sum(1).sqrt().T
    if backbone is not None:
        norms = norms.repeat(len(backbone), 1)
        norms[:, 0] = backbone.double().sqrt()
    shares = gates.double().expand(len(norms), -1)
    if weight is not None:
        shares = shares * weight.double()[:, None]
    return (shares * norms).sum(0), shares.sum(0)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "gated", "blocks"), [(0, 3, 2), (2, 2, 1), (33, 11, 6), (70, 34, 3), (8250, 3, 2)])
def test_counters(rows: int, gated: int, blocks: int, weighted: bool, one_row: bool) -> None:
    """Row counts above a warp's lanes, above a slice of 32, and above 256 slices of 32."""
    level = counted(rows, gated, blocks, one_row, weighted)
    (found,) = counts(level)
    for value, exact in zip(found, exact_counts(*level), strict=True):
        assert_near(value, exact, 1)


@pytest.mark.parametrize("one_row", [False, True])
def test_counters_of_several_levels(one_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are bitwise equal for every launch and order."""
    sizes = [(40, 2, 1), (0, 5, 2), (300, 17, 3), (64, 9, 1), (2, 301, 2), (33, 3, 4), (5, 2, 1), (100, 33, 2)]
    levels = [counted(*size, one_row, bool(seed % 2), seed) for seed, size in enumerate(sizes)]
    alone = [counts(level)[0] for level in levels]
    for order, number in (("ascending", 1), ("descending", 2), ("descending", 5), ("ascending", 4)):
        monkeypatch.setenv("XSMOE_EMULATED_ORDER", order)
        monkeypatch.setenv("XSMOE_EMULATED_MULTIPROCESSORS", str(number))
        for found, want in zip(counts(*levels), alone, strict=True):
            assert all(map(torch.equal, found, want))


def sloped(rows: int, dim: int, gated: int, chunks: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Return x, backbone, grad, gates, dots."""
    gates = torch.softmax(normal(rows, gated, seed=seed), -1)
    x, backbone, grad = (normal(rows, dim, dtype=dtype, seed=seed + place) for place in (1, 2, 3))
    return x, backbone, grad, gates, normal(rows, (gated - 1) * chunks, seed=seed + 4)


def slopes(
    *levels: tuple[Tensor, ...], logits: bool = True, backbone: bool = True, dots: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    columns = map(list, zip(*levels, strict=True))
    found: tuple[list[Tensor], list[Tensor]] = torch.ops.xsmoe_cuda.side_moe_logit_gradient(
        *columns, dots or [], logits, backbone
    )
    return found


def exact_slope(
    x: Tensor, backbone: Tensor, grad: Tensor, gates: Tensor, dots: Tensor, dot: Tensor | None = None
) -> Tensor:
    rows, gated = gates.shape
    by_expert = dots.double().view(rows, gated - 1, dots.shape[1] // (gated - 1)).sum(-1)
    first = torch.linalg.vecdot(grad.double(), backbone.double())[:, None] if dot is None else dot.double()[:, None]
    change = torch.cat([first, torch.linalg.vecdot(grad.double(), x.double())[:, None] + by_expert], 1)
    share = gates.double()
    return share * (change - (share * change).sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim", "gated"), SHAPES + REAL_SHAPES * ON_GPU)
def test_logit_gradients(rows: int, dim: int, gated: int, dtype: torch.dtype) -> None:
    level = sloped(rows, dim, gated, 1 + gated % 3, dtype)
    (grad_logits,), (grad_backbone,) = slopes(level)
    assert grad_logits.shape == (rows, -(-gated // 16) * 16)
    assert not grad_logits[:, gated:].any()
    assert_near(grad_logits[:, :gated], exact_slope(*level), dim)
    assert torch.equal(grad_backbone, (level[3][:, :1] * level[2].float()).to(dtype))
    (only_logits,), none = slopes(level, backbone=False)
    assert torch.equal(only_logits, grad_logits)
    assert none == []
    nothing, (only_backbone,) = slopes(level, logits=False)
    assert torch.equal(only_backbone, grad_backbone)
    assert nothing == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [40, 37])
def test_logit_gradients_of_one_row(dtype: torch.dtype, dim: int) -> None:
    """The gradient is a float32 sum for every dtype of x, and the backbone's part is a sum already."""
    x, _, _, gates, dots = sloped(1, dim, 11, 2, dtype)
    backbone, grad, dot = normal(7, dim, dtype=dtype), normal(1, dim, seed=9), normal(1, seed=10)
    (found,), _ = slopes((x, backbone, grad, gates, dots), backbone=False, dots=[dot])
    assert_near(found[:, :11], exact_slope(x, backbone, grad, gates, dots, dot), dim)


@settings(max_examples=200 if ON_GPU else 25, deadline=None, derandomize=True)
@given(data=st.data())
def test_logit_gradients_of_any_levels(data: st.DataObject) -> None:
    """Each level is bitwise equal to the level alone in a dense layout."""
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    levels, alone = [], []
    for seed in range(data.draw(st.integers(1, 8), "levels")):
        rows, dim = data.draw(st.integers(0, 9), "rows"), data.draw(st.integers(1, 40), "dim")
        gated, chunks = data.draw(st.integers(2, 40), "gated"), data.draw(st.integers(1, 3), "chunks")
        level = sloped(rows, dim, gated, chunks, dtype, seed)
        alone.append(slopes(level))
        gap = data.draw(st.integers(0, 9), "gap")
        placed = [torch.cat([one, one.new_full((rows, gap), float("nan"))], 1)[:, :dim] for one in level[:3]]
        levels.append((*placed, *level[3:]))
    for found, found_backbone, ((want,), (want_backbone,)) in zip(*slopes(*levels), alone, strict=True):
        assert torch.equal(found, want)
        assert torch.equal(found_backbone, want_backbone)


def test_rows_beyond_two_to_the_31() -> None:
    stride = 2**30 + 24
    x, router = routed(3, 24, 5, torch.float16)
    far = spread(x, (stride, 1))
    assert torch.equal(gates_of((far, router))[0], gates_of((x, router))[0])
    level = sloped(3, 24, 5, 1, torch.float16)
    for found, want in zip(slopes((far, far, far, *level[3:])), slopes((x, x, x, *level[3:])), strict=True):
        assert torch.equal(found[0], want[0])


def test_the_order_of_blocks_changes_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, router = routed(70, 24, 20, torch.bfloat16)
    level = sloped(70, 24, 20, 2, torch.bfloat16)
    first = [*gates_of((x, router)), *slopes(level)[0], *slopes(level)[1]]
    monkeypatch.setenv("XSMOE_EMULATED_ORDER", "descending")
    again = [*gates_of((x, router)), *slopes(level)[0], *slopes(level)[1]]
    assert all(map(torch.equal, first, again))


def test_lists_that_do_not_fit_are_rejected() -> None:
    x, router = routed(2, 8, 3, torch.float32)
    with pytest.raises(ValueError, match="x must have an entry for each of 1 to 8 levels, not 9"):
        gates_of(*[(x, router)] * 9)
    with pytest.raises(ValueError, match="router must have an entry for each"):
        torch.ops.xsmoe_cuda.side_moe_gate([x, x], [router])
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        gates_of((x.double(), router.double()))
