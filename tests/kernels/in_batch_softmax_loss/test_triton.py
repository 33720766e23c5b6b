"""The Triton kernels of in_batch_softmax_loss against float64: in Triton's interpreter, or on a GPU if there is one."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.gpu_waits import assert_waits_for_nothing
from tests.kernels.helpers.native_in_batch_softmax_loss import GRADIENTS, NAME, Case
from tests.kernels.helpers.triton_gpu import (
    DEVICE,
    DTYPES,
    ON_GPU,
    leave_memory_alone,
    needs_gpu,
    reverse_programs,
    spread,
)
from tests.kernels.helpers.triton_in_batch_softmax_loss import (
    MARKS,
    check,
    draw,
    outputs,
    replaced,
    same_as_reference,
    within_budget,
)
from xsmoe_kernels import in_batch_softmax_loss
from xsmoe_kernels.backends import triton as triton_backend
from xsmoe_kernels.runtime import dispatch

pytestmark = MARKS


@settings(deadline=None, derandomize=True, max_examples=300 if ON_GPU else 12)
@given(
    st.builds(
        Case,
        # Below, at and past blocks of queries and of items, and enough for several slices.
        queries=st.sampled_from([0, 1, 2, 15, 16, 17, 33, 50, *((129, 700) if ON_GPU else ())]),
        items=st.sampled_from([1, 2, 31, 32, 33, 65, 130, *((257, 3000) if ON_GPU else ())]),
        dim=st.sampled_from([0, 1, 3, 16, 17, 32, 33, 64, *((128, 200) if ON_GPU else ())]),
        width=st.sampled_from([0, 1, 3, 4, 5, 11]),
        users=st.sampled_from([0, 1, 5]),
        logq=st.booleans(),
        counts=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        needed=st.tuples(st.booleans(), st.booleans()),
        seed=st.integers(0, 100),
    )
)
@example(Case(50, 130, 33, 5, 5, dtype=torch.float16))
@example(Case(1, 1, 1, 1))
def test_stays_within_the_error_budget(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needed", [(False, False), (False, True), (True, False), (True, True)])
def test_every_subset_of_gradients(dtype: torch.dtype, needed: tuple[bool, bool]) -> None:
    check(Case(20, 40, 20, 3, 5, dtype=dtype, needed=needed))


@pytest.mark.parametrize("most", [1, 2, 6])
def test_slices_do_not_change_results(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from xsmoe_kernels.triton_utils import kernel_helpers

    scale = 8 if ON_GPU else 1
    case = Case(100 * scale, 170 * scale, 20, 3, 7)
    monkeypatch.setattr(kernel_helpers, "ENOUGH_PROGRAMS", most * 7)
    launched = spied(monkeypatch)
    check(case)
    assert ("slice_sum_kernel" in [name for name, _ in launched]) == (most > 1)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Return the kernels launched from now on, and their arguments."""
    from xsmoe_kernels.triton_utils import kernel_helpers

    launched, launch = [], kernel_helpers.launch

    def spy(kernel: Any, grid: Any, device: Any, arguments: Any, constants: Any, config: Any) -> None:
        launched.append((kernel.__name__, {**arguments, **constants}))
        launch(kernel, grid, device, arguments, constants, config)

    monkeypatch.setattr(kernel_helpers, "launch", spy)
    return launched


def test_no_tensor_of_all_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    from xsmoe_kernels.triton_utils import kernel_helpers

    # Partial sums have as many numbers as fill the device, whatever there is to sum.
    monkeypatch.setattr(kernel_helpers, "ENOUGH_PROGRAMS", 1)
    launched = spied(monkeypatch)
    size = 2000 if ON_GPU else 130
    outputs(draw(Case(size, size, 16)), "triton")
    sizes = [value.numel() for _, arguments in launched for value in arguments.values() if isinstance(value, Tensor)]
    assert 0 < max(sizes) < size * size // 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again_in_any_order_of_programs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = draw(Case(34, 70, 20, 5, 4, dtype=dtype))
    expected = outputs(batch, "triton")
    reverse_programs(monkeypatch)
    for name, value in outputs(batch, "triton").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_logits_far_from_zero(scale: float) -> None:
    batch = draw(Case(33, 130, 16, 3))
    batch = replaced(batch, queries=batch["queries"].detach() * scale)
    actual, expected = outputs(batch, "triton"), outputs(batch, "reference")
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_small_shares_keep_their_digits_in_float16() -> None:
    batch = draw(Case(17, 70, 8, counts=False, dtype=torch.float16))
    # Every target has nearly all of its query, the others less than a millionth each: below the least normal number.
    batch |= {"targets": batch["targets"] % 2, "rejected": torch.tensor([0, 1], device=DEVICE).expand(17, 2)}
    batch["logq"] = torch.full((70,), 15.0, device=DEVICE).index_fill(0, torch.tensor([0, 1], device=DEVICE), 0.0)
    wide = replaced(batch, **{name: batch[name].float() for name in GRADIENTS})
    actual = outputs(batch, "triton", 1e4)["items"][2:].float()
    expected = outputs(wide, "reference", 1e4)["items"][2:]
    assert torch.linalg.vector_norm(actual - expected) < 2e-3 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_strided_inputs_and_other_dtypes_of_the_correction(dtype: torch.dtype) -> None:
    batch = draw(Case(30, 40, 9, 4, 5))
    batch |= {"logq": batch["logq"].to(dtype), "counts": batch["counts"].to(dtype)}
    strided = batch | {
        name: torch.stack([batch[name], batch[name]], dim=-1)[..., 0]
        for name in ("targets", "rejected", "users", "logq", "counts")
    }
    strided = replaced(strided, **{name: batch[name].detach().T.contiguous().T for name in GRADIENTS})
    torch.testing.assert_close(outputs(strided, "triton"), outputs(batch, "triton"), rtol=0, atol=0)
    same_as_reference(batch)


@pytest.mark.parametrize("dim", [16, 48])
def test_rows_are_copied_only_if_not_aligned(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = spied(monkeypatch)
    batch = draw(Case(20, 40, dim, 1))
    wide = torch.randn(20, dim + 16, device=DEVICE)
    for queries in (batch["queries"], wide[:, :dim], wide[:, 1 : dim + 1]):
        launched.clear()
        other = replaced(batch, queries=queries)
        within_budget(other)
        in_place = all(
            arguments["queries"].data_ptr() == other["queries"].data_ptr()
            for _, arguments in launched
            if "queries" in arguments
        )
        assert in_place == (queries.data_ptr() % 16 == 0)


@pytest.mark.parametrize("num_items", [0, 40])
def test_no_queries_give_zero_and_zero_gradients(num_items: int) -> None:
    batch = draw(Case(0, num_items, 8, 2))
    found = outputs(batch, "triton", upstream=torch.inf)
    assert found["loss"] == 0
    assert found["queries"].shape == (0, 8)
    assert torch.equal(found["items"], torch.zeros(num_items, 8, device=DEVICE))


def test_users_of_one_position_each() -> None:
    batch = draw(Case(20, 40, 8, 4))
    by_user = outputs(batch | {"users": torch.arange(20, device=DEVICE)}, "triton")
    for name, value in outputs(batch, "triton").items():
        assert torch.equal(value, by_user[name]), name


def test_many_items() -> None:
    check(Case(3, 300_000 if ON_GPU else 700, 4, 3, 2))


def test_gradients_computed_by_forward() -> None:
    batch = draw(Case(20, 40, 8, 4))
    inputs = [value if value is None else value.detach() for value in batch.values()]
    inputs[-1] = inputs[-1].float()
    operator, backward = torch.ops.xsmoe.in_batch_softmax_loss, torch.ops.xsmoe.in_batch_softmax_loss_backward
    _, lse, *ahead = operator(*inputs, True, True, "triton")
    _, same, *nothing = operator(*inputs, False, False, "triton")
    assert torch.equal(lse, same)
    assert [tuple(value.shape) for value in nothing] == [(0,), (0,)]
    grad = torch.tensor(3.0, device=DEVICE)
    later = backward(*inputs, lse, None, None, grad, True, True, "triton")
    taken = backward(*inputs, lse, *ahead, grad, True, True, "triton")
    torch.testing.assert_close(taken, later)
    expected = operator(*inputs, False, False, "reference")[1]
    torch.testing.assert_close(lse, expected)


def test_scaled_copies_exist_for_gradients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fills(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(str(function))
            return function(*args, **kwargs or {})

    from xsmoe_kernels.ops.in_batch_softmax_loss import triton_launchers
    from xsmoe_kernels.triton_utils import kernel_helpers

    ran: list[str] = []
    monkeypatch.setattr(kernel_helpers, "launch", lambda *_: None)
    inputs = [value if value is None else value.detach() for value in draw(Case(6, 8, 16, 2)).values()]
    for needed, fills in ((False, 0), (True, 1)):
        ran.clear()
        with Fills():
            triton_launchers.forward(*inputs, needed, needed)
        assert sum("ones" in name for name in ran) == fills


@pytest.mark.parametrize("grad", [torch.nan, torch.inf])
def test_without_queries_gradients_of_forward_are_zero(grad: float) -> None:
    inputs = [value if value is None else value.detach() for value in draw(Case(0, 5, 8, 2)).values()]
    inputs[-1] = inputs[-1].float()
    _, lse, *ahead = torch.ops.xsmoe.in_batch_softmax_loss(*inputs, True, True, "triton")
    upstream = torch.tensor(grad, device=DEVICE)
    backward = torch.ops.xsmoe.in_batch_softmax_loss_backward
    of_queries, of_items = backward(*inputs, lse, *ahead, upstream, True, True, "triton")
    assert of_queries.shape == (0, 8)
    assert torch.equal(of_items, torch.zeros(5, 8, device=DEVICE))


def test_opcheck() -> None:
    batch = draw(Case(6, 5, 3, 2, 2))
    batch["counts"] = batch["counts"].float()
    operator, backward = torch.ops.xsmoe.in_batch_softmax_loss, torch.ops.xsmoe.in_batch_softmax_loss_backward
    torch.library.opcheck(operator, (*batch.values(), False, False, "triton"))
    inputs = [value if value is None else value.detach() for value in batch.values()]
    _, lse, *_ = operator(*inputs, False, False, "triton")
    grad = torch.tensor(0.5, device=DEVICE)
    torch.library.opcheck(backward, (*inputs, lse, None, None, grad, True, True, "triton"))


def test_autocast_casts_queries_and_items_only() -> None:
    # bfloat16 has no 301.
    batch = draw(Case(20, 40, 8, 4))
    batch["counts"] = batch["counts"].clamp(min=1) * 301
    low = replaced(batch, **{name: batch[name].bfloat16() for name in GRADIENTS})
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = outputs(batch, "triton")
    assert torch.equal(found["loss"], outputs(low, "triton")["loss"])
    assert found["items"].dtype == torch.float32


def test_rows_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = draw(Case(34, 40, 16, 2, dtype=torch.float16))
    expected = outputs(batch, "triton")
    leave_memory_alone(monkeypatch)
    far = {name: spread(batch[name].detach(), (2**26 + 64, 1)) for name in GRADIENTS}
    for name, value in outputs(replaced(batch, **far), "triton").items():
        assert torch.equal(value, expected[name]), name


def test_is_registered() -> None:
    for operator in (NAME, f"{NAME}_backward"):
        module, function = triton_backend.LAUNCHERS[operator].split(":")
        assert callable(getattr(importlib.import_module(f"xsmoe_kernels.{module}"), function))


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@needs_gpu
@pytest.mark.usefixtures("tf32")
def test_tf32() -> None:
    check(Case(2560, 2640, 128, 11, 256))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [128, 256])
def test_the_sizes_of_training(dtype: torch.dtype, dim: int) -> None:
    check(Case(2560, 2640, dim, 11, 256, dtype=dtype))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_waits_for_nothing_and_is_captured_by_a_graph(dtype: torch.dtype) -> None:
    batch = draw(Case(700, 900, 64, 11, 70, dtype=dtype))
    inputs = [value if value is None else value.detach() for value in batch.values()]
    inputs[-1] = inputs[-1].float()
    grad = torch.tensor(2.0, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        loss, lse, *_ = torch.ops.xsmoe.in_batch_softmax_loss(*inputs, False, False, "triton")
        rest = (lse, None, None, grad, True, True, "triton")
        return loss, *torch.ops.xsmoe.in_batch_softmax_loss_backward(*inputs, *rest)

    assert_waits_for_nothing(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        for mine, other in zip(inputs, draw(Case(700, 900, 64, 11, 70, dtype=dtype, seed=seed)).values(), strict=True):
            mine.copy_(other.detach())
        graph.replay()
        for actual, wanted in zip(captured, step(), strict=True):
            assert torch.equal(actual, wanted)


@needs_gpu
def test_compiles_whole() -> None:
    batch = draw(Case(300, 400, 64, 11, 30))
    batch["counts"] = batch["counts"].float()
    leaves = [batch[name] for name in GRADIENTS]
    before = dispatch.calls.copy()
    loss = compiled(in_batch_softmax_loss, backend="inductor")(**batch)
    found = torch.autograd.grad(loss, leaves)
    assert set(dispatch.calls - before) == {(NAME, "triton"), (f"{NAME}_backward", "triton")}
    for actual, wanted in zip((loss, *found), outputs(batch, "triton", 1.0).values(), strict=True):
        assert torch.equal(actual, wanted)
