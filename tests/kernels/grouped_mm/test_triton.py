"""The Triton kernels of grouped_mm against the reference: in Triton's interpreter, or on a GPU if there is one."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.error_budget import assert_within_budget
from tests.kernels.helpers.triton_gpu import (
    DEVICE,
    DTYPES,
    ON_GPU,
    leave_memory_alone,
    needs_gpu,
    needs_triton,
    reverse_programs,
    spread,
)
from xsmoe_kernels.ops.grouped_mm import grouped_mm
from xsmoe_kernels.runtime import dispatch
from xsmoe_kernels.runtime.dispatch import use_backend

pytestmark = needs_triton
NAMES = ("y", "gradient of x", "gradient of weight")


def on(backend: str, grad: Tensor, *arguments: Any, needs: tuple[bool, bool] = (True, True)) -> tuple[Tensor, ...]:
    """Return the results of the operator and its backward; `arguments` are x, weight, offsets and num_frozen."""
    y = torch.ops.xsmoe.grouped_mm(*arguments, backend)
    return y, *torch.ops.xsmoe.grouped_mm_backward(grad, *arguments, *needs, backend)


def make(
    num_rows: int,
    bounds: list[int],
    inner: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the upstream gradient, x, weight and offsets."""
    generator = torch.Generator().manual_seed(num_rows + inner)

    def draw(*shape: int) -> Tensor:
        if layout == "transposed":
            return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).to(DEVICE, dtype).mT
        if layout == "apart":
            return torch.randn(*shape[:-1], 2 * shape[-1] + 3, generator=generator).to(DEVICE, dtype)[..., 3::2]
        if layout == "wide":
            return torch.randn(*shape[:-1], shape[-1] + 5, generator=generator).to(DEVICE, dtype)[..., 2:-3]
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    x, weight, grad = draw(num_rows, inner), draw(len(bounds) - 1, inner, columns), draw(num_rows, columns)
    return grad, x, weight, torch.tensor(bounds, device=DEVICE)


def assert_agrees(
    grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, needs: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, ...]:
    """Fail unless the results are within the error budget; return them."""
    actual, same_dtype = (on(backend, grad, x, weight, *rest, needs=needs) for backend in ("triton", "reference"))
    exact = on("reference", grad.double(), x.double(), weight.double(), *rest, needs=needs)
    for name, *values in zip(NAMES, actual, same_dtype, exact, strict=True):
        assert_within_budget(*values, name)
    return actual


SIZES = [0, 1, 2, 3, 16, 17, 31, 32, 33, 65, *((128, 129, 300, 768) if ON_GPU else ())]


@settings(deadline=None, derandomize=True, max_examples=300 if ON_GPU else 30)
@given(
    # Groups that are empty, smaller than a tile, one past a tile, and of several tiles.
    sizes=st.lists(
        st.sampled_from([0, 0, 1, 2, 15, 16, 17, 33, 50, *((128, 700) if ON_GPU else ())]), min_size=2, max_size=9
    ),
    inner=st.sampled_from(SIZES),
    columns=st.sampled_from(SIZES),
    frozen=st.integers(0, 7),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "apart", "wide"]),
    index=st.sampled_from([torch.int32, torch.int64]),
    needs=st.sampled_from([(True, True), (True, True), (True, False), (False, True), (False, False)]),
)
def test_stays_within_the_error_budget(
    sizes: list[int],
    inner: int,
    columns: int,
    frozen: int,
    dtype: torch.dtype,
    layout: str,
    index: torch.dtype,
    needs: tuple[bool, bool],
) -> None:
    # The first and the last of the sizes are rows outside of all groups.
    bounds = torch.tensor(sizes[:-1]).cumsum(0).tolist()
    num_frozen = min(frozen, len(bounds) - 1)
    grad, x, weight, offsets = make(sum(sizes), bounds, inner, columns, dtype, layout)
    y, grad_x, grad_weight = assert_agrees(grad, x, weight, offsets.to(index), num_frozen, needs=needs)
    for rows in (slice(0, bounds[0]), slice(bounds[-1], None)):
        assert (y[rows] == 0).all()
        assert not needs[0] or (grad_x[rows] == 0).all()
    assert not needs[1] or (grad_weight[:num_frozen] == 0).all()


def test_more_experts_than_are_compared_at_once() -> None:
    bounds = torch.tensor([3, *[0, 1, 0, 2, 0] * 27, 20]).cumsum(0).tolist()
    assert len(bounds) > 128
    assert_agrees(*make(bounds[-1] + 2, bounds, 5, 3), 130)


@pytest.mark.parametrize(
    "bounds, dtype",
    [([0, 0, 290, 296], torch.float32), ([5, 170, 260, 261], torch.bfloat16), ([5, 170, 260, 261], torch.float16)],
)
def test_long_groups_are_cut_into_slices(
    bounds: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = started_kernels(monkeypatch)
    scale = 14 if ON_GPU else 1
    grad, x, weight, offsets = make(300 * scale, [bound * scale for bound in bounds], 20, 17, dtype)
    for num_frozen in (0, 1, 3):
        first = assert_agrees(grad, x, weight, offsets, num_frozen)
        assert (first[2][:num_frozen] == 0).all()
        second = on("triton", grad, x, weight, offsets, num_frozen)
        assert all(torch.equal(*values) for values in zip(first, second, strict=True)), "not the same bits twice"
    assert "slice_sum_kernel" in started


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_experts_are_skipped(dtype: torch.dtype) -> None:
    # So few rows that the number of trainable experts does not decide how they are cut.
    grad, x, weight, offsets = make(60, [0, 19, 19, 40, 60], 17, 37, dtype)
    expected = on("triton", grad, x, weight, offsets, 0)[2]
    for num_frozen in range(5):
        frozen_rows = x.clone()
        frozen_rows[: int(offsets[num_frozen])] = torch.nan
        actual = on("triton", grad, frozen_rows, weight, offsets, num_frozen)[2]
        assert (actual[:num_frozen] == 0).all()
        assert torch.equal(actual[num_frozen:], expected[num_frozen:])


@pytest.mark.parametrize("rows, dtype", [(260, torch.bfloat16), *((60, dtype) for dtype in DTYPES)])
def test_nothing_leaks_from_other_rows(rows: int, dtype: torch.dtype) -> None:
    grad, x, weight, offsets = make(rows, [7, 20, rows - 10], 33, 20, dtype)
    expected = on("triton", grad, x, weight, offsets, 0)
    for outside in (slice(0, 7), slice(rows - 10, None)):
        x[outside], grad[outside] = torch.nan, torch.inf
    for name, actual, wanted in zip(NAMES, on("triton", grad, x, weight, offsets, 0), expected, strict=True):
        assert torch.equal(actual, wanted), name
    # Nor from one group to the other, but into its own.
    x[:20], grad[:20] = torch.nan, torch.nan
    y, grad_x, grad_weight = on("triton", grad, x, weight, offsets, 0)
    assert y[7:20].isnan().all()
    assert grad_x[7:20].isnan().all()
    assert grad_weight[0].isnan().all()
    assert torch.equal(y[20:], expected[0][20:])
    assert torch.equal(grad_x[20:], expected[1][20:])
    assert torch.equal(grad_weight[1], expected[2][1])


def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = *make(300, [3, 20, 37, 37, 290], 33, 20), 1
    expected = on("triton", *arguments)
    reverse_programs(monkeypatch)
    for name, actual, wanted in zip(NAMES, on("triton", *arguments), expected, strict=True):
        assert torch.equal(actual, wanted), name


def test_a_weight_is_not_copied_for_its_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, x, weight, offsets = make(20, [0, 8, 20], 6, 10)
    weights: list[int] = []
    started_kernels(monkeypatch, lambda arguments: weights.append(arguments.get("weight", x).data_ptr()))
    for view in (weight, torch.stack([weight, weight], dim=1)[:, 1], weight.mT.contiguous().mT):
        weights.clear()
        y, grad_x, _ = on("triton", grad, x, view, offsets, 0, needs=(True, False))
        assert weights == [view.data_ptr()] * 2
        torch.testing.assert_close(y, on("reference", grad, x, weight, offsets, 0)[0])
        torch.testing.assert_close(grad_x, on("reference", grad, x, weight, offsets, 0)[1])


def test_offsets_may_be_strided() -> None:
    grad, x, weight, _ = make(20, [0, 8, 20], 6, 10)
    offsets = torch.tensor([0, 19, 8, 19, 20, 19], dtype=torch.int32, device=DEVICE)[::2]
    assert_agrees(grad, x, weight, offsets, 1)


@pytest.mark.parametrize("num_rows", [0, 40])
def test_no_experts(num_rows: int) -> None:
    grad, x, weight, offsets = make(num_rows, [num_rows // 2], 4, 2)
    y, grad_x, grad_weight = on("triton", grad, x, weight, offsets, 0)
    assert y.shape == (num_rows, 2)
    assert (y == 0).all()
    assert grad_x.shape == (num_rows, 4)
    assert (grad_x == 0).all()
    assert grad_weight.shape == (0, 4, 2)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_gradients_of_every_subset(needs: tuple[bool, bool]) -> None:
    grad, x, weight, offsets = make(30, [2, 2, 20, 28], 9, 6)
    inputs = [
        tensor for tensor, need in zip((x, weight), needs, strict=True) if tensor.requires_grad_(need).requires_grad
    ]
    before = dispatch.calls.copy()
    with use_backend("triton"):
        y = grouped_mm(x, weight, offsets, num_frozen=1)
    # Backward runs on the backend that forward used.
    grads = torch.autograd.grad(y, inputs, grad)
    assert dispatch.calls - before == {("grouped_mm", "triton"): 1, ("grouped_mm_backward", "triton"): 1}
    expected = on("reference", grad, x.detach(), weight.detach(), offsets, 1)[1:]
    for actual, wanted in zip(grads, [g for g, need in zip(expected, needs, strict=True) if need], strict=True):
        torch.testing.assert_close(actual, wanted)


def test_an_expanded_upstream_gradient() -> None:
    _, x, weight, offsets = make(30, [2, 2, 20, 28], 9, 6)
    inputs = x.requires_grad_(), weight.requires_grad_()
    with use_backend("triton"):
        actual = torch.autograd.grad(grouped_mm(x, weight, offsets).sum(), inputs)
    with use_backend("reference"):
        expected = torch.autograd.grad(grouped_mm(x, weight, offsets).sum(), inputs)
    torch.testing.assert_close(actual, expected)


def test_autocast() -> None:
    _, x, weight, offsets = make(30, [2, 2, 20, 28], 9, 6)
    with torch.autocast(DEVICE.type, torch.bfloat16), use_backend("triton"):
        y = grouped_mm(x, weight, offsets)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.ops.xsmoe.grouped_mm(x.bfloat16(), weight.bfloat16(), offsets, 0, "triton"))


def test_places_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, x, weight, offsets = make(40, [3, 17, 17, 38], 8, 5, torch.float16)
    far_x = spread(x, (2**31 // 30, 1))
    far_grad = spread(grad, (2**31 // 30, 1))
    far_weight = spread(weight, (2**30 + 64, 5, 1))
    expected = on("triton", grad, x, weight, offsets, 1)
    leave_memory_alone(monkeypatch)
    actual = on("triton", far_grad, far_x, far_weight, offsets, 1)
    # Within an expert, too.
    actual += (torch.ops.xsmoe.grouped_mm(x, spread(weight, (5, 2**31 // 6, 1)), offsets, 1, "triton"),)
    for wanted, value in zip((*expected, expected[0]), actual, strict=True):
        assert torch.equal(wanted, value)


def started_kernels(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[Any], object] = lambda arguments: None
) -> set[str]:
    """Return the names of all kernels launched from now on; `look` is called with their arguments."""
    from xsmoe_kernels.triton_utils import kernel_helpers

    names, launch = set(), kernel_helpers.launch

    def spy(kernel: Any, grid: Any, device: Any, arguments: Any, *rest: Any) -> None:
        names.add(kernel.__name__)
        look(arguments)
        launch(kernel, grid, device, arguments, *rest)

    monkeypatch.setattr(kernel_helpers, "launch", spy)
    return names


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@needs_gpu
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("inner, columns", [(768, 64), (64, 768), (100, 33)])
def test_tf32(inner: int, columns: int) -> None:
    assert_agrees(*make(3000, [0, 500, 500, 1700, 2990], inner, columns), 1)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_waits_for_nothing_and_is_captured_by_a_graph(dtype: torch.dtype) -> None:
    grad, x, weight, offsets = make(3000, [0, 500, 500, 1700, 2990], 768, 64, dtype)
    on("triton", grad, x, weight, offsets, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on("triton", grad, x, weight, offsets, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on("triton", grad, x, weight, offsets, 1)
    for bounds in ([0, 500, 500, 1700, 2990], [10, 10, 2000, 2000, 3000], [0, 0, 0, 0, 0]):
        offsets.copy_(torch.tensor(bounds))
        graph.replay()
        expected = on("triton", grad, x, weight, offsets, 1)
        for name, actual, wanted in zip(NAMES, captured, expected, strict=True):
            assert torch.equal(actual, wanted), name


@needs_gpu
def test_compiles_whole() -> None:
    grad, x, weight, offsets = make(300, [0, 50, 50, 170, 290], 64, 48)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    before = dispatch.calls.copy()
    y = compiled(grouped_mm, backend="inductor")(x, weight, offsets, num_frozen=1)
    actual = y, *torch.autograd.grad(y, (x, weight), grad)
    assert set(dispatch.calls - before) == {("grouped_mm", "triton"), ("grouped_mm_backward", "triton")}
    expected = on("triton", grad, x.detach(), weight.detach(), offsets, 1)
    for name, value, wanted in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(value, wanted), name


@needs_gpu
def test_more_experts_or_rows_do_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def run(num_rows: int, num_experts: int) -> None:
        bounds = [num_rows * expert // num_experts for expert in range(num_experts + 1)]
        on("triton", *make(num_rows, bounds, 48, 64), num_experts - 1)

    run(3000, 5)
    compiled_anew: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **seen: compiled_anew.append(seen["repr"]) or False
    )
    for num_rows, num_experts in ((3000, 1), (3000, 2), (2048, 16), (2999, 33), (4096, 32)):
        run(num_rows, num_experts)
    assert not compiled_anew


@needs_gpu
def test_results_beyond_32_bits() -> None:
    num_rows, columns = 2**21 + 5, 1040
    needed = 3 * num_rows * columns * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {math.ceil(needed / 2**30)} GiB")
    _, x, weight, offsets = make(8, [0, num_rows - 100, num_rows], 16, columns, torch.bfloat16)
    x = x[:1].expand(num_rows, 16)
    y = torch.ops.xsmoe.grouped_mm(x, weight, offsets, 0, "triton")
    expected = torch.ops.xsmoe.grouped_mm(x[:2], weight, torch.tensor([0, 1, 2], device=DEVICE), 0, "triton")
    assert (y[: num_rows - 100] == expected[0]).all()
    assert (y[num_rows - 100 :] == expected[1]).all()
