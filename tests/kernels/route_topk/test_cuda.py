"""Tests of the CUDA kernels of route_topk only; test_gpu.py tests all GPU kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.cuda_library import DEVICE, ON_GPU, needs_cuda_kernels, needs_gpu
from tests.kernels.helpers.routing_checks import KINDS, assert_agrees, on, random_logits
from tests.kernels.helpers.triton_gpu import DTYPES

pytestmark = needs_cuda_kernels

needs_emulation = pytest.mark.skipif(ON_GPU, reason="a GPU has as many multiprocessors as it has")


@settings(deadline=None, derandomize=True, max_examples=600 if ON_GPU else 120)
@given(
    num_rows=st.sampled_from([1, 2, 3, 15, 33, *((1000, 5000) if ON_GPU else ())]),
    # Around the ends of what a number of lanes holds.
    num_experts=st.sampled_from([4, 10, 16, 17, 24, 32, 33, 64, 65, 96, 255, 256, 257, 512, 1000, 1024]),
    most=st.sampled_from([1, 2, 5, 40]),
    renormalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 100),
)
def test_rows_of_any_length(
    num_rows: int, num_experts: int, most: int, renormalize: bool, dtype: torch.dtype, kind: str, seed: int
) -> None:
    assert_agrees("cuda", random_logits(num_rows, num_experts, dtype, kind, seed), min(most, num_experts), renormalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [64, 256, 1000, 1024])
def test_all_experts_are_chosen(num_experts: int, dtype: torch.dtype) -> None:
    assert_agrees("cuda", random_logits(3, num_experts, dtype, "ties"), num_experts, True)


def test_numbers_of_16_bits_keep_their_order() -> None:
    """Adjacent float values: the expert is stored in bits of their keys."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        logits = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))].view(dtype)
        assert_agrees("cuda", logits.view(-1, 16).to(DEVICE), 16, False)


# Experts and rows: one block, as many as there may be, more of them than are added up at once.
SHAPES = [(10, 256), (10, 2000), (33, 2700), (300, 100), (1000, 40)]


@needs_emulation
@pytest.mark.parametrize("num_experts, num_rows", SHAPES)
def test_blocks_may_be_as_many_as_they_like_and_in_any_order(
    num_experts: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(num_rows, num_experts, torch.float32, "ties")
    grad = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(0))
    expected = assert_agrees("cuda", logits, 3, False)[:4]
    gradients = on("cuda", logits, 3, False, grad)[4]
    for multiprocessors in (1, 2, 5, 20):
        monkeypatch.setenv("XSMOE_EMULATED_MULTIPROCESSORS", str(multiprocessors))
        for order in ("ascending", "descending"):
            monkeypatch.setenv("XSMOE_EMULATED_ORDER", order)
            for actual, wanted in zip(on("cuda", logits, 3, False, grad), (*expected, gradients), strict=True):
                assert torch.equal(actual, wanted)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = random_logits(40, 21, torch.float32)
    grad = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    together = on("cuda", logits, 3, False, grad)
    for row in (0, 7, 39):
        alone = on("cuda", logits[row : row + 1], 3, False, grad[row : row + 1])
        for place in (0, 1, 4):
            assert torch.equal(alone[place][0], together[place][row])


def laid_out(grad: Tensor) -> list[Tensor]:
    """Gradients with other strides, or expanded from one number."""
    return [
        grad.T.contiguous().T,
        grad[:, :1].expand(grad.shape),
        grad[:1].expand(grad.shape),
        grad[0, 0].expand(grad.shape),
    ]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradients_of_any_strides(dtype: torch.dtype, renormalize: bool) -> None:
    logits = random_logits(19, 6, dtype)
    experts = torch.ops.xsmoe.route_topk(logits, 3, renormalize, "reference")[1]
    drawn = torch.randn(19, 3, generator=torch.Generator().manual_seed(0)).to(logits)
    for grad in laid_out(drawn):
        actual, wanted = (
            torch.ops.xsmoe.route_topk_backward(taken, logits, chosen, renormalize, "cuda")
            for taken, chosen in ((grad, experts.T.contiguous().T), (grad.contiguous(), experts))
        )
        assert torch.equal(actual, wanted)


def test_gradients_of_another_dtype_are_rejected() -> None:
    logits = random_logits(4, 6, torch.bfloat16)
    experts = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="grad must have the dtype of logits, BFloat16, not Float; convert it"):
        torch.ops.xsmoe.route_topk_backward(torch.ones(4, 1, device=DEVICE), logits, experts, True, "cuda")


@needs_gpu
def test_runs_on_the_current_stream() -> None:
    logits = random_logits(3000, 40, torch.float32)
    grad = torch.randn(3000, 3, device=DEVICE)
    expected = on("cuda", logits, 3, True, grad)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    with torch.cuda.stream(other):
        late = torch.zeros_like(logits)
        torch.cuda._sleep(10**7)
        late.copy_(logits)
        actual = on("cuda", late, 3, True, grad)
    other.synchronize()
    assert not torch.cuda.default_stream().query()
    for value, wanted in zip(actual, expected, strict=True):
        assert torch.equal(value, wanted)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors() -> None:
    logits = random_logits(3000, 40, torch.float32)
    grad = torch.randn(3000, 3, device=DEVICE)
    expected = on("cuda", logits, 3, True, grad)
    actual = on("cuda", logits.to("cuda:1"), 3, True, grad.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for value, wanted in zip(actual, expected, strict=True):
        assert value.device.index == 1
        assert torch.equal(value.to(DEVICE), wanted)
