"""The Triton kernels of route_topk against the reference: in Triton's interpreter, or on a GPU where there is one."""

import importlib
import math
import mmap
from typing import Any

import pytest
import torch
from compilation import compiled
from error_budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xsmoe_kernels import dispatch
from xsmoe_kernels.dispatch import use_backend
from xsmoe_kernels.route_topk import Routing, route_topk

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ABSENCE = dispatch.unavailable("route_topk", "triton", DEVICE, torch.float32)
pytestmark = [
    pytest.mark.skipif(ABSENCE is not None, reason=ABSENCE or ""),
    # NumPy's, of infinity less infinity and of 0 by 0, which the interpreter divides outside of masks.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHOICES = ("experts", "order", "offsets")


def on(backend: str, logits: Tensor, k: int, renormalize: bool, grad: Tensor) -> tuple[Tensor, ...]:
    """Gates, experts, order and offsets, and the gradient of the logits for an upstream gradient of the gates."""
    routing = torch.ops.xsmoe.route_topk(logits, k, renormalize, backend)
    grad = grad.to(logits.dtype)
    return *routing, torch.ops.xsmoe.route_topk_backward(grad, logits, routing[1], renormalize, backend)


def assert_agrees(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, ...]:
    """Fails unless choices are those of the reference, and gates and gradients keep within the error budget."""
    generator = torch.Generator().manual_seed(k)
    grad = torch.randn(len(logits), k, generator=generator).to(logits)
    actual, same_dtype = (on(backend, logits, k, renormalize, grad) for backend in ("triton", "reference"))
    exact = on("reference", logits.double(), k, renormalize, grad)
    for name, value, wanted in zip(CHOICES, actual[1:4], same_dtype[1:4], strict=True):
        assert torch.equal(value, wanted), name
    for place, name in ((0, "gates"), (4, "gradient")):
        values = actual[place], same_dtype[place], exact[place]
        assert torch.equal(values[0].isnan(), values[1].isnan()), f"{name}: other places are NaN"
        assert_within_budget(*(value.nan_to_num() for value in values), name)
    return actual


def random_logits(num_rows: int, num_experts: int, dtype: torch.dtype, kind: str = "plain", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_experts, generator=generator)
    if kind == "ties":
        logits = logits.round()
    if kind == "special":
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -torch.nan])
        special = values[torch.randint(len(values), (num_rows, num_experts), generator=generator)]
        logits = torch.where(torch.rand(num_rows, num_experts, generator=generator) < 0.2, special, logits)
    if kind == "lowest":
        logits = torch.where(torch.rand(num_rows, num_experts, generator=generator) < 0.6, -torch.inf, logits)
    logits = logits.to(DEVICE, dtype)
    if kind == "transposed":
        return logits.T.contiguous().T
    if kind == "wide":
        return torch.cat([logits, torch.full_like(logits, torch.nan)], dim=1)[:, :num_experts]
    return logits


@settings(deadline=None, derandomize=True, max_examples=400 if GPU else 45)
@given(
    # One past the rows of a block, and several times as many.
    num_rows=st.sampled_from([0, 1, 7, 8, 9, 16, 17, 33, *((31, 32, 65, 3000) if GPU else ())]),
    num_experts=st.sampled_from([1, 2, 3, 5, 8, 16, 31, 32, 33, 65]),
    share=st.floats(0, 1),
    renormalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["plain", "ties", "special", "lowest", "transposed", "wide"]),
    seed=st.integers(0, 100),
)
def test_agrees_with_the_reference(
    num_rows: int, num_experts: int, share: float, renormalize: bool, dtype: torch.dtype, kind: str, seed: int
) -> None:
    k = max(1, round(share * num_experts))
    assert_agrees(random_logits(num_rows, num_experts, dtype, kind, seed), k, renormalize)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("kind", ["plain", "special"])
@pytest.mark.parametrize("num_experts, k", [(1024, 1), (1000, 8), (513, 40), *([(1024, 1024)] if GPU else [])])
def test_hundreds_of_experts(num_experts: int, k: int, kind: str, renormalize: bool) -> None:
    assert_agrees(random_logits(3000 if GPU else 5, num_experts, torch.float32, kind), k, renormalize)


def test_no_rows() -> None:
    gates, experts, order, offsets, grad_logits = assert_agrees(random_logits(0, 5, torch.float32), 2, True)
    assert [tuple(t.shape) for t in (gates, experts, order, grad_logits)] == [(0, 2), (0, 2), (0,), (0, 5)]
    assert offsets.tolist() == [0] * 6


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_of_several_blocks(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Twice as many columns as the fewest halve the parts.
    kernels = importlib.import_module("xsmoe_kernels.route_topk.triton_kernels")
    monkeypatch.setattr(kernels, "MOST_PARTS", 2 * parts)
    assert_agrees(random_logits(1000 if GPU else 65, 33, torch.float32, "ties"), 3, True)


def test_more_parts_than_are_added_up_at_once() -> None:
    num_rows = 512 * 32 * 3 + 5 if GPU else 8 * 34 + 1
    assert_agrees(random_logits(num_rows, 5, torch.float32, "ties"), 2, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_nan_first_and_both_zeros_alike(dtype: torch.dtype) -> None:
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[1.0, nan, inf, -nan, 2.0], [-0.0, 0.0, -0.0, -1.0, -inf], [-inf] * 5, [nan] * 5, [3.0] * 5],
        dtype=dtype,
        device=DEVICE,
    )
    with use_backend("triton"):
        experts = route_topk(logits, 5).experts.tolist()
    assert experts == [[1, 3, 2, 4, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    for k in range(1, 6):
        for renormalize in (True, False):
            assert_agrees(logits, k, renormalize)


def test_probabilities_that_underflow_still_rank_and_renormalize() -> None:
    logits = torch.tensor([[0.0, -300.0, -200.0, -400.0]], device=DEVICE)
    with use_backend("triton"):
        assert route_topk(logits, 3).experts.tolist() == [[0, 2, 1]]
        assert route_topk(logits[:, 1:], 2).gates.sum() == 1


def test_neighbouring_numbers_keep_their_order() -> None:
    # Their softmax does not tell them apart, nor does a key of fewer bits.
    tiny, next_to_one = 1e-45, 1 + torch.finfo(torch.float32).eps
    logits = torch.tensor(
        [[1, next_to_one, 1], [-1, -next_to_one, -1], [-tiny, 0, tiny], [1e-38, 2e-38, 0]], device=DEVICE
    )
    with use_backend("triton"):
        assert route_topk(logits, 3).experts.tolist() == [[1, 0, 2], [0, 2, 1], [2, 1, 0], [1, 0, 2]]


def test_too_many_experts_are_named() -> None:
    with use_backend("triton"), pytest.raises(ValueError, match="logits has 1025 experts, but the triton kernels"):
        route_topk(torch.zeros(2, 1025, device=DEVICE), 1)


@pytest.mark.parametrize("renormalize", [True, False])
def test_gives_the_same_bits_twice(renormalize: bool) -> None:
    logits = random_logits(20000 if GPU else 50, 21, torch.float32)
    grad = torch.randn(len(logits), 4, device=DEVICE)
    first, second = (on("triton", logits, 4, renormalize, grad) for _ in range(2))
    assert all(torch.equal(*values) for values in zip(first, second, strict=True))


def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(50, 21, torch.float32)
    grad = torch.randn(50, 4, device=DEVICE)
    expected = on("triton", logits, 4, True, grad)
    if not GPU:
        # From the last to the first; on a GPU they run in any order.
        from triton.runtime.interpreter import interpreter_builder as builder

        def set_grid_idx(x: int, y: int, z: int) -> None:
            builder.grid_idx = (builder.grid_dim[0] - 1 - x, y, z)

        monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    for actual, wanted in zip(on("triton", logits, 4, True, grad), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_gradients_and_the_count_of_calls() -> None:
    logits = random_logits(9, 6, torch.float32)
    expected = torch.autograd.grad(route_topk(x := logits.double().requires_grad_(), 2).gates[:, 0].sum(), x)[0]
    before = dispatch.calls.copy()
    with use_backend("triton"):
        routing = route_topk(x := logits.clone().requires_grad_(), 2)
    assert [t.requires_grad for t in routing] == [True, False, False, False]
    # Backward runs on the backend that forward used; its upstream gradient has no memory of its own.
    torch.testing.assert_close(torch.autograd.grad(routing.gates[:, 0].sum(), x)[0], expected.float())
    assert dispatch.calls - before == {("route_topk", "triton"): 1, ("route_topk_backward", "triton"): 1}


def test_an_expanded_upstream_gradient() -> None:
    logits = random_logits(9, 6, torch.float32)
    with use_backend("triton"):
        gates = route_topk(x := logits.clone().requires_grad_(), 2, renormalize=False).gates
    (actual,) = torch.autograd.grad(gates.sum(), x)
    expected = on("reference", logits, 2, False, torch.ones(9, 2, device=DEVICE))[4]
    torch.testing.assert_close(actual, expected)


def test_autocast_leaves_the_logits_alone() -> None:
    logits = random_logits(9, 6, torch.float32)
    with use_backend("triton"):
        with torch.autocast(DEVICE, torch.bfloat16):
            gates = route_topk(logits, 2).gates
        assert torch.equal(gates, route_topk(logits, 2).gates)


def test_places_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(34, 3, torch.float16)
    grad = torch.randn(34, 2).to(logits)
    expected = on("triton", logits, 2, True, grad)
    length, stride = 33 * (2**31 // 30) + 3, 2**31 // 30
    if GPU:
        far = logits.new_zeros(length)
    else:
        # Of which only the pages that hold logits are ever there.
        pages = mmap.mmap(-1, 2 * length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        far = torch.frombuffer(pages, dtype=torch.float16)
        # Else the interpreter copies arguments back, which are on the CPU already.
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
    far = far.as_strided((34, 3), (stride, 1)).copy_(logits)
    for actual, wanted in zip(on("triton", far, 2, True, grad), expected, strict=True):
        assert torch.equal(actual, wanted)


@gpu_only
def test_results_beyond_32_bits() -> None:
    num_rows, num_experts, k = 2**26 + 3, 33, 32
    needed = num_rows * (2 * num_experts + 2 * k + 2 * 8 * k) + 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {math.ceil(needed / 2**30)} GiB")
    logits = torch.arange(num_experts, device=DEVICE, dtype=torch.bfloat16).expand(num_rows, num_experts)
    gates, experts, order, offsets = torch.ops.xsmoe.route_topk(logits, k, True, "triton")
    # Every row chooses all experts but the first, the last of them first.
    assert offsets.tolist() == [0, *(num_rows * expert for expert in range(num_experts))]
    assert torch.equal(experts[-1], torch.arange(k, 0, -1, device=DEVICE))
    assert torch.equal(gates[-1], gates[0])
    rows = torch.arange(num_rows, device=DEVICE)
    for expert in (1, 2, 31, 32):
        assert torch.equal(order[offsets[expert] : offsets[expert + 1]], rows * k + (k - expert))


@gpu_only
@pytest.mark.parametrize("num_experts", [8, 300])
def test_waits_for_nothing_and_is_captured_by_a_graph(num_experts: int) -> None:
    logits = random_logits(3000, num_experts, torch.bfloat16)
    grad = torch.randn(3000, 4, device=DEVICE).bfloat16()
    on("triton", logits, 4, True, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on("triton", logits, 4, True, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on("triton", logits, 4, True, grad)
    for seed in range(3):
        logits.copy_(random_logits(3000, num_experts, torch.bfloat16, seed=seed))
        graph.replay()
        for actual, wanted in zip(captured, on("triton", logits, 4, True, grad), strict=True):
            assert torch.equal(actual, wanted)


@gpu_only
def test_compiles_whole() -> None:
    logits = random_logits(300, 6, torch.float32).requires_grad_()
    before = dispatch.calls.copy()
    routing = Routing(*compiled(route_topk, backend="inductor")(logits, 2))
    (grad,) = torch.autograd.grad(routing.gates[:, 0].sum(), logits)
    assert set(dispatch.calls - before) == {("route_topk", "triton"), ("route_topk_backward", "triton")}
    upstream = torch.tensor([1.0, 0.0], device=DEVICE).expand(300, 2)
    for actual, wanted in zip((*routing, grad), on("triton", logits.detach(), 2, True, upstream), strict=True):
        assert torch.equal(actual, wanted)


@gpu_only
def test_more_experts_or_rows_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def run(num_rows: int, num_experts: int) -> None:
        on(
            "triton",
            random_logits(num_rows, num_experts, torch.float32),
            1,
            True,
            torch.ones(num_rows, 1, device=DEVICE),
        )

    run(3000, 5)
    compiled_anew: list[Any] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **seen: compiled_anew.append(seen["repr"]) or False
    )
    for num_rows, num_experts in ((3000, 1), (2048, 16), (1, 2), (2999, 31), (100000, 32)):
        run(num_rows, num_experts)
    assert not compiled_anew
