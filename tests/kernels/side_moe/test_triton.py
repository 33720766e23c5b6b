"""The Triton side_moe: error budget, edges, determinism; in Triton's interpreter, or at real sizes on a GPU."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.helpers import gpu_side_moe as shared
from tests.kernels.helpers.gpu_side_moe import plain_level
from tests.kernels.helpers.side_level import make_level
from tests.kernels.helpers.side_moe_check import Call, check_backend, served_results
from tests.kernels.helpers.triton_gpu import DEVICE, DTYPES, ON_GPU, needs_gpu, needs_triton
from xsmoe_kernels import BackendUnavailable, FrozenExperts, Utilization, side_moe, use_backend

pytestmark = needs_triton

check = partial(check_backend, "triton")


# rows, dim, experts, rank, one row; past a block of rows (32), of columns (64), of gates (16), of an expert's columns.
CASES = [
    (33, 64, 3, 16, False, Call(num_frozen=2, apart=True, weighted=True, recompute=True)),
    (40, 33, 3, 17, False, Call(num_frozen=1, activation="gelu_tanh", recompute=False)),
    (33, 70, 2, 65, False, Call(activation="relu", counted=False, recompute=True)),
    (34, 24, 33, 7, False, Call(num_frozen=32, apart=True, counted=False, recompute=False)),
    (31, 7, 16, 3, False, Call(num_frozen=16, weighted=True)),
    (65, 20, 15, 1, False, Call(num_frozen=3)),
    (70, 65, 4, 48, True, Call(num_frozen=3, apart=True, weighted=True)),
    (37, 7, 33, 1, True, Call(num_frozen=5, recompute=False, counted=False)),
    (2, 1, 1, 1, True, Call(activation="relu")),
    (1, 1, 1, 1, False, Call()),
    (1, 100, 1, 130, False, Call(num_frozen=1)),
    (0, 17, 3, 5, False, Call(num_frozen=1, weighted=True)),
    (0, 17, 3, 5, True, Call(num_frozen=3, apart=True)),
]
REAL_CASES = [
    (2816, 768, 10, 64, False, Call(num_frozen=9, apart=True)),
    (2816, 768, 10, 64, False, Call(num_frozen=9, apart=True, recompute=True, weighted=True)),
    (2816, 768, 10, 64, True, Call(num_frozen=9, apart=True)),
    (2817, 768, 33, 64, False, Call(num_frozen=32)),
    (1000, 384, 5, 100, False, Call(counted=False, activation="gelu_tanh")),
    (4097, 512, 3, 256, False, Call(num_frozen=1, activation="relu")),
    (65536, 768, 2, 64, False, Call(num_frozen=1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim", "experts", "rank", "one_row", "call"), CASES + REAL_CASES * ON_GPU)
def test_error_budget(
    rows: int, dim: int, experts: int, rank: int, one_row: bool, call: Call, dtype: torch.dtype
) -> None:
    check(plain_level(rows, dim, experts, rank, one_row=one_row, dtype=dtype), call)


@needs_gpu
@pytest.mark.parametrize("one_row", [False, True])
def test_error_budget_with_tf32(one_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    check(plain_level(2816, 768, 10, 64, one_row=one_row), Call(num_frozen=9, apart=True))


any_shape = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@settings(any_shape, max_examples=200 if ON_GPU else 6)
@given(data=st.data())
def test_error_budget_of_any_shape(data: st.DataObject) -> None:
    check_any_shape(data)


@pytest.mark.slow
@settings(any_shape, max_examples=200 if ON_GPU else 24)
@given(data=st.data())
def test_error_budget_of_more_shapes(data: st.DataObject) -> None:
    check_any_shape(data)


def check_any_shape(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 33), "experts")
    rows = data.draw(st.one_of(st.sampled_from((0, 1, 31, 33)), st.integers(0, 70)), "rows")
    dim = data.draw(st.integers(1, 70), "dim")
    rank = data.draw(st.integers(1, 70 if experts < 4 else 9), "rank")
    call = Call(
        num_frozen=data.draw(st.integers(0, experts), "num_frozen"),
        apart=data.draw(st.booleans(), "apart"),
        activation=data.draw(st.sampled_from(("gelu", "gelu_tanh", "relu")), "activation"),
        recompute=data.draw(st.booleans(), "recompute"),
        counted=data.draw(st.booleans(), "counted"),
        weighted=data.draw(st.booleans(), "weighted"),
        needed=data.draw(st.tuples(*[st.booleans()] * 5), "needed"),
    )
    one_row, dtype = data.draw(st.booleans(), "one_row"), data.draw(st.sampled_from(DTYPES), "dtype")
    check(plain_level(rows, dim, experts, rank, one_row=one_row, dtype=dtype), call)


@pytest.mark.parametrize(("one_row", "recompute"), [(False, False), (True, True)])
def test_every_subset_of_gradients(one_row: bool, recompute: bool) -> None:
    level = plain_level(18, 20, 3, 5, one_row=one_row)
    call = Call(num_frozen=1, recompute=recompute)
    everything = check(level, call)
    for needed in itertools.product((False, True), repeat=5):
        for name, value in served_results(level, call._replace(needed=needed), "triton").items():
            # What is asked for together must not change what is computed.
            torch.testing.assert_close(value, everything[name], rtol=1e-5, atol=1e-6, msg=f"{name} of {needed}")


@pytest.mark.parametrize("apart", [False, True])
def test_every_num_frozen(apart: bool) -> None:
    level = plain_level(20, 24, 4, 8)
    for num_frozen in range(5):
        check(level, Call(num_frozen=num_frozen, apart=apart))


def test_counters_do_not_depend_on_other_options() -> None:
    level = plain_level(40, 33, 3, 17)
    counted, plain = (served_results(level, Call(counted=counted), "triton") for counted in (True, False))
    for name, value in plain.items():
        torch.testing.assert_close(value, counted[name], rtol=1e-5, atol=1e-6)


def test_a_gradient_of_equal_rows() -> None:
    leaves = [tensor.requires_grad_() for tensor in plain_level(40, 20, 3, 5)]
    with use_backend("triton"):
        y = side_moe(*leaves)
    ones = torch.ones(1, device=DEVICE)
    expanded = torch.autograd.grad(y, leaves, ones.expand_as(y), retain_graph=True)
    for gradient, want in zip(expanded, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True):
        assert torch.equal(gradient, want)


def test_an_expert_that_overflows_spoils_no_other() -> None:
    """Only the columns of the NaN expert become NaN, not those of the other expert in the tile."""
    level = plain_level(33, 16, 2, 5)
    down = level.down.clone()
    down[0] = float("nan")
    leaves = [*level[:3], down.requires_grad_(), level.up.clone().requires_grad_()]
    with use_backend("triton"):
        y = side_moe(*leaves, num_frozen=0)
    grad_up = torch.autograd.grad(y, leaves[4], torch.ones_like(y))[0]
    assert grad_up[0].isnan().all()
    assert grad_up[1].isfinite().all()


def test_float64_is_rejected_by_name() -> None:
    level = make_level(3, 4, 2, 2, requires_grad=False)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="the triton kernels support"):
        side_moe(*(tensor.to(DEVICE) for tensor in level))


def test_frozen_experts_and_num_frozen_give_the_same_bits() -> None:
    level = plain_level(33, 16, 3, 4)
    frozen = FrozenExperts(level.down[:2], level.up[:2])
    counters = [Utilization(3, DEVICE) for _ in range(2)]
    with use_backend("triton"):
        y = side_moe(*level[:3], level.down[2:], level.up[2:], frozen=frozen, utilization=counters[0])
        want = side_moe(*level, num_frozen=2, utilization=counters[1])
    assert torch.equal(y, want)
    assert torch.equal(counters[0].norm, counters[1].norm)


def test_a_launch_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from xsmoe_kernels.triton_utils import kernel_helpers
    from xsmoe_kernels.triton_utils.tuning import Config

    current = [0]

    class OnDevice:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Kernel:
        launched: list[int] = []  # noqa: RUF012

        def __getitem__(self, grid: object) -> Any:
            return lambda **_: self.launched.append(current[-1])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    for index in (0, 1):
        kernel_helpers.launch(Kernel(), (1,), torch.device("cuda", index), {}, {}, Config({}))
    kernel_helpers.launch(Kernel(), (0, 3), torch.device("cuda", 0), {}, {}, Config({}))
    assert Kernel.launched == [0, 1]


def test_autocast_runs_in_16_bits() -> None:
    level = plain_level(33, 16, 3, 4)
    with use_backend("triton"), torch.autocast(DEVICE.type, torch.bfloat16):
        y = side_moe(*level)
    with use_backend("triton"):
        want = side_moe(*(tensor.bfloat16() for tensor in level))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_twice(dtype: torch.dtype, one_row: bool) -> None:
    shared.check_the_same_bits_twice("triton", dtype, one_row)


@pytest.mark.parametrize("one_row", [False, True])
def test_rows_of_any_stride(one_row: bool) -> None:
    shared.check_rows_of_any_stride("triton", one_row)


def test_places_beyond_two_to_the_31() -> None:
    shared.check_places_beyond_two_to_the_31("triton")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(value: float) -> None:
    shared.check_a_row_that_is_not_finite_spoils_no_other("triton", value)


@pytest.mark.parametrize(("one_row", "rows", "size"), [(False, 3, 8000.0), (True, 100, 100.0)])
def test_large_gradients_in_float16(one_row: bool, rows: int, size: float) -> None:
    shared.check_large_gradients_in_float16("triton", one_row, rows, size)


def test_logits_without_a_bound_below() -> None:
    shared.check_logits_without_a_bound_below("triton")


@pytest.mark.parametrize("needed", [(True, False, False, False, False), (False, False, True, True, False), (True,) * 5])
def test_opcheck(needed: tuple[bool, ...]) -> None:
    shared.check_with_opcheck("triton", needed)


def test_compiles_as_one_graph() -> None:
    shared.check_compiles_as_one_graph("triton")


@needs_gpu
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_as_a_cuda_graph(dtype: torch.dtype, one_row: bool) -> None:
    shared.check_replays_as_a_cuda_graph("triton", dtype, one_row)


@needs_gpu
def test_never_waits_for_the_device() -> None:
    shared.check_never_waits_for_the_device("triton")


@needs_gpu
def test_runs_on_the_current_stream() -> None:
    shared.check_runs_on_the_current_stream("triton")


@needs_gpu
def test_no_tensor_of_rows_times_experts_times_width() -> None:
    level = plain_level(65536, 768, 10, 64, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in level]
    grad = torch.ones_like(level.backbone)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with use_backend("triton"):
        y = side_moe(*leaves, num_frozen=9, recompute=True)
        torch.autograd.grad(y, leaves, grad)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 65536 * 10 * 768 * 2, "less than one such tensor"
