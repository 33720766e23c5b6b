"""side_moe on backend "cuda": CUDA kernels for rows, with Triton's products.

Without a GPU both are emulated on CPU tensors: Triton's kernels by its interpreter, CUDA's by fibers.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.helpers import gpu_side_moe as shared
from tests.kernels.helpers.cuda_library import DEVICE, ON_GPU, needs_gpu
from tests.kernels.helpers.gpu_side_levels import check_each_level_has_the_bits_that_it_has_on_its_own
from tests.kernels.helpers.gpu_side_moe import plain_level
from tests.kernels.helpers.side_level import make_level
from tests.kernels.helpers.side_moe_check import Call, check_backend
from tests.kernels.helpers.triton_gpu import DTYPES
from xsmoe_kernels import BackendUnavailable, side_moe, side_moe_group, use_backend
from xsmoe_kernels.backends import cuda as cuda_backend
from xsmoe_kernels.runtime import dispatch

_reason = dispatch.unavailable_reason("side_moe", "cuda", DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(_reason is not None, reason=_reason or "")

# Past a block of rows of Triton's, several kinds of everything.
CASES = [
    (33, 40, 3, 16, False, Call(num_frozen=2, apart=True, weighted=True, recompute=True)),
    (34, 23, 17, 5, False, Call(num_frozen=1, activation="gelu_tanh", recompute=False)),
    (33, 24, 2, 65, False, Call(activation="relu", counted=False)),
    (35, 16, 4, 8, True, Call(num_frozen=3, apart=True, weighted=True)),
    (1, 1, 1, 1, False, Call()),
    (0, 17, 3, 5, False, Call(num_frozen=1, weighted=True)),
    (0, 17, 3, 5, True, Call(num_frozen=3, apart=True)),
]
REAL_CASES = [
    (2816, 768, 10, 64, False, Call(num_frozen=9, apart=True, weighted=True)),
    (2816, 768, 10, 64, True, Call(num_frozen=9, apart=True)),
    (2817, 768, 33, 64, False, Call(num_frozen=32, recompute=True)),
    (65536, 768, 2, 64, False, Call(num_frozen=1)),
]


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else (torch.bfloat16,))
@pytest.mark.parametrize(("rows", "dim", "experts", "rank", "one_row", "call"), CASES + REAL_CASES * ON_GPU)
def test_error_budget(
    rows: int, dim: int, experts: int, rank: int, one_row: bool, call: Call, dtype: torch.dtype
) -> None:
    check_backend("cuda", plain_level(rows, dim, experts, rank, one_row=one_row, dtype=dtype), call)


@settings(
    max_examples=200 if ON_GPU else 3, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(data=st.data())
def test_error_budget_of_any_shape(data: st.DataObject) -> None:
    experts, rank = data.draw(st.integers(1, 20), "experts"), data.draw(st.integers(1, 9), "rank")
    rows, dim = data.draw(st.integers(0, 40), "rows"), data.draw(st.integers(1, 40), "dim")
    call = Call(
        num_frozen=data.draw(st.integers(0, experts), "num_frozen"),
        apart=data.draw(st.booleans(), "apart"),
        recompute=data.draw(st.booleans(), "recompute"),
        counted=data.draw(st.booleans(), "counted"),
        weighted=data.draw(st.booleans(), "weighted"),
        needed=data.draw(st.tuples(*[st.booleans()] * 5), "needed"),
    )
    one_row, dtype = data.draw(st.booleans(), "one_row"), data.draw(st.sampled_from(DTYPES), "dtype")
    check_backend("cuda", plain_level(rows, dim, experts, rank, one_row=one_row, dtype=dtype), call)


def test_each_level_of_a_group_has_the_bits_that_it_has_on_its_own() -> None:
    # Triton's interpreter needs half a minute for all of them; these are two of one kind, and one with a single row.
    check_each_level_has_the_bits_that_it_has_on_its_own("cuda", slice(None) if ON_GPU else slice(0, 6, 2))


def test_rows_of_any_stride() -> None:
    shared.check_rows_of_any_stride("cuda", one_row=False)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    shared.check_a_row_that_is_not_finite_spoils_no_other("cuda", float("nan"))


def test_logits_without_a_bound_below() -> None:
    shared.check_logits_without_a_bound_below("cuda")


@pytest.mark.parametrize(("one_row", "rows", "size"), [(False, 3, 8000.0), (True, 100, 100.0)])
def test_large_gradients_in_float16(one_row: bool, rows: int, size: float) -> None:
    shared.check_large_gradients_in_float16("cuda", one_row, rows, size)


def test_opcheck() -> None:
    shared.check_with_opcheck("cuda", (True,) * 5)


def test_compiles_as_one_graph() -> None:
    shared.check_compiles_as_one_graph("cuda")


def test_products_are_tritons_and_all_else_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from xsmoe_kernels.triton_utils import kernel_helpers

    launched = []
    launch = kernel_helpers.launch
    monkeypatch.setattr(
        kernel_helpers, "launch", lambda kernel, *rest: (launched.append(kernel.fn.__name__), launch(kernel, *rest))
    )
    leaves = [tensor.requires_grad_() for tensor in plain_level(5, 16, 2, 4)]
    with use_backend("cuda"):
        side_moe(*leaves).sum().backward()
    expected = ["hidden", "mixture", "hidden_gradient", "row_gradient", "weight_gradient", "weight_sum"]
    assert launched == [f"{name}_kernel" for name in expected]


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(dispatch._kernels["side_moe"], "triton")
    monkeypatch.setitem(dispatch._reasons, ("triton", None), "triton is not installed")
    level = plain_level(2, 4, 1, 2)
    for call in (lambda: side_moe(*level), lambda: side_moe_group([level._asdict()])):
        with (
            use_backend("cuda"),
            pytest.raises(BackendUnavailable, match="its matrix products run on Triton, and triton is not installed"),
        ):
            call()


@pytest.mark.parametrize(
    ("name", "schema"), [("side_moe_new", "(Tensor x) -> Tensor"), ("side_moe_gate", "(Tensor[] x) -> Tensor[] gates")]
)
def test_a_library_of_other_kernels_is_rejected(name: str, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = cuda_backend.OPERATORS["side_moe"]
    changed = served._replace(launched={**served.launched, name: schema})
    monkeypatch.setitem(cuda_backend.OPERATORS, "side_moe", changed)
    monkeypatch.setenv("XSMOE_CUDA_LIBRARY", str(cuda_backend.library))
    with pytest.raises(ImportError, match=f"another version of xsmoe_kernels: its schema of {name}"):
        cuda_backend.load()


def test_float64_is_rejected_by_name() -> None:
    level = make_level(3, 4, 2, 2, requires_grad=False)
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="the cuda kernels support"):
        side_moe(*(tensor.to(DEVICE) for tensor in level))


@needs_gpu
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_twice(dtype: torch.dtype, one_row: bool) -> None:
    shared.check_the_same_bits_twice("cuda", dtype, one_row)


@needs_gpu
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_as_a_cuda_graph(dtype: torch.dtype, one_row: bool) -> None:
    shared.check_replays_as_a_cuda_graph("cuda", dtype, one_row)


@needs_gpu
def test_never_waits_for_the_device() -> None:
    shared.check_never_waits_for_the_device("cuda")


@needs_gpu
def test_runs_on_the_current_stream() -> None:
    shared.check_runs_on_the_current_stream("cuda")


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors() -> None:
    level = plain_level(40, 24, 3, 8)
    with use_backend("cuda"):
        want = side_moe(*level)
        found = side_moe(*(tensor.to("cuda:1") for tensor in level))
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.cpu(), want.cpu())
