"""The GPU kernels of route_topk against the reference; emulated without a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.cuda_library import needs_cuda_kernels
from tests.kernels.helpers.routing_checks import KINDS, assert_agrees, on, random_logits
from tests.kernels.helpers.triton_gpu import DEVICE, DTYPES, ON_GPU, leave_memory_alone, needs_gpu, needs_triton, spread
from xsmoe_kernels.ops.route_topk import Routing, route_topk
from xsmoe_kernels.runtime import dispatch
from xsmoe_kernels.runtime.dispatch import BackendUnavailable, use_backend

# NumPy's, of infinity less infinity and of 0 by 0, which Triton's interpreter divides outside of masks.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(
    scope="module",
    params=[pytest.param("triton", marks=needs_triton), pytest.param("cuda", marks=needs_cuda_kernels)],
)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@settings(deadline=None, derandomize=True, max_examples=400 if ON_GPU else 45)
@given(
    # One past the rows of a block, and several times as many.
    num_rows=st.sampled_from([0, 1, 7, 8, 9, 16, 17, 33, *((31, 32, 65, 3000) if ON_GPU else ())]),
    num_experts=st.sampled_from([1, 2, 3, 5, 8, 16, 31, 32, 33, 65]),
    share=st.floats(0, 1),
    renormalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 100),
)
def test_agrees_with_the_reference(
    backend: str,
    num_rows: int,
    num_experts: int,
    share: float,
    renormalize: bool,
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    k = max(1, round(share * num_experts))
    assert_agrees(backend, random_logits(num_rows, num_experts, dtype, kind, seed), k, renormalize)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("kind", ["plain", "special"])
@pytest.mark.parametrize("num_experts, k", [(1024, 1), (1000, 8), (513, 40), *([(1024, 1024)] if ON_GPU else [])])
def test_hundreds_of_experts(backend: str, num_experts: int, k: int, kind: str, renormalize: bool) -> None:
    assert_agrees(backend, random_logits(3000 if ON_GPU else 5, num_experts, torch.float32, kind), k, renormalize)


def test_no_rows(backend: str) -> None:
    gates, experts, order, offsets, grad_logits = assert_agrees(backend, random_logits(0, 5, torch.float32), 2, True)
    assert [tuple(t.shape) for t in (gates, experts, order, grad_logits)] == [(0, 2), (0, 2), (0,), (0, 5)]
    assert offsets.tolist() == [0] * 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_nan_first_and_both_zeros_alike(backend: str, dtype: torch.dtype) -> None:
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[1.0, nan, inf, -nan, 2.0], [-0.0, 0.0, -0.0, -1.0, -inf], [-inf] * 5, [nan] * 5, [3.0] * 5],
        dtype=dtype,
        device=DEVICE,
    )
    with use_backend(backend):
        experts = route_topk(logits, 5).experts.tolist()
    assert experts == [[1, 3, 2, 4, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    for k in range(1, 6):
        for renormalize in (True, False):
            assert_agrees(backend, logits, k, renormalize)


def test_probabilities_that_underflow_still_rank_and_renormalize(backend: str) -> None:
    logits = torch.tensor([[0.0, -300.0, -200.0, -400.0]], device=DEVICE)
    with use_backend(backend):
        assert route_topk(logits, 3).experts.tolist() == [[0, 2, 1]]
        assert route_topk(logits[:, 1:], 2).gates.sum() == 1


def test_neighbouring_numbers_keep_their_order(backend: str) -> None:
    # Their softmax is equal, and so is a key of fewer bits.
    tiny, next_to_one = 1e-45, 1 + torch.finfo(torch.float32).eps
    logits = torch.tensor(
        [[1, next_to_one, 1], [-1, -next_to_one, -1], [-tiny, 0, tiny], [1e-38, 2e-38, 0]], device=DEVICE
    )
    with use_backend(backend):
        assert route_topk(logits, 3).experts.tolist() == [[1, 0, 2], [0, 2, 1], [2, 1, 0], [1, 0, 2]]


def test_too_many_experts_are_left_to_the_reference(backend: str) -> None:
    logits, message = torch.zeros(2, 1025, device=DEVICE), "logits has 1025 experts, but .* at most 1024"
    with use_backend(backend), pytest.raises(BackendUnavailable, match=message):
        route_topk(logits, 1)
    with pytest.raises(BackendUnavailable, match=message):
        torch.ops.xsmoe.route_topk_backward(logits[:, :1], logits, torch.zeros(2, 1).long(), True, backend)
    for operator, arguments in (("route_topk", (logits,)), ("route_topk_backward", (logits, logits))):
        assert dispatch.select(operator, "auto", torch.device("cuda"), torch.float32, *arguments) == "reference"
    assert route_topk(logits, 1).experts.tolist() == [[0], [0]]


@pytest.mark.parametrize("renormalize", [True, False])
def test_is_deterministic(backend: str, renormalize: bool) -> None:
    logits = random_logits(20000 if ON_GPU else 50, 21, torch.float32)
    grad = torch.randn(len(logits), 4, device=DEVICE)
    first, second = (on(backend, logits, 4, renormalize, grad) for _ in range(2))
    assert all(torch.equal(*values) for values in zip(first, second, strict=True))


def test_gradients_and_the_count_of_calls(backend: str) -> None:
    logits = random_logits(9, 6, torch.float32)
    expected = torch.autograd.grad(route_topk(x := logits.double().requires_grad_(), 2).gates[:, 0].sum(), x)[0]
    before = dispatch.calls.copy()
    with use_backend(backend):
        routing = route_topk(x := logits.clone().requires_grad_(), 2)
    assert [t.requires_grad for t in routing] == [True, False, False, False]
    # Backward runs on the backend that forward used; its upstream gradient has no memory of its own.
    torch.testing.assert_close(torch.autograd.grad(routing.gates[:, 0].sum(), x)[0], expected.float())
    assert dispatch.calls - before == {("route_topk", backend): 1, ("route_topk_backward", backend): 1}


def test_an_expanded_upstream_gradient(backend: str) -> None:
    logits = random_logits(9, 6, torch.float32)
    with use_backend(backend):
        gates = route_topk(x := logits.clone().requires_grad_(), 2, renormalize=False).gates
    (actual,) = torch.autograd.grad(gates.sum(), x)
    expected = on("reference", logits, 2, False, torch.ones(9, 2, device=DEVICE))[4]
    torch.testing.assert_close(actual, expected)


def test_autocast_leaves_the_logits_alone(backend: str) -> None:
    logits = random_logits(9, 6, torch.float32)
    with use_backend(backend):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            gates = route_topk(logits, 2).gates
        assert torch.equal(gates, route_topk(logits, 2).gates)


def test_places_beyond_32_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(34, 3, torch.float16)
    grad = torch.randn(34, 2).to(logits)
    expected = on(backend, logits, 2, True, grad)
    if backend == "triton":
        leave_memory_alone(monkeypatch)
    far = spread(logits, (2**31 // 30, 1))
    for actual, wanted in zip(on(backend, far, 2, True, grad), expected, strict=True):
        assert torch.equal(actual, wanted)


@needs_gpu
def test_results_beyond_32_bits(backend: str) -> None:
    num_rows, num_experts, k = 2**26 + 3, 33, 32
    needed = num_rows * (2 * num_experts + 2 * k + 2 * 8 * k) + 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {math.ceil(needed / 2**30)} GiB")
    logits = torch.arange(num_experts, device=DEVICE, dtype=torch.bfloat16).expand(num_rows, num_experts)
    gates, experts, order, offsets = torch.ops.xsmoe.route_topk(logits, k, True, backend)
    # Every row chooses all experts but the first, the last of them first.
    assert offsets.tolist() == [0, *(num_rows * expert for expert in range(num_experts))]
    assert torch.equal(experts[-1], torch.arange(k, 0, -1, device=DEVICE))
    assert torch.equal(gates[-1], gates[0])
    rows = torch.arange(num_rows, device=DEVICE)
    for expert in (1, 2, 31, 32):
        assert torch.equal(order[offsets[expert] : offsets[expert + 1]], rows * k + (k - expert))


@needs_gpu
@pytest.mark.parametrize("num_experts", [8, 300])
def test_waits_for_nothing_and_is_captured_by_a_graph(backend: str, num_experts: int) -> None:
    logits = random_logits(3000, num_experts, torch.bfloat16)
    grad = torch.randn(3000, 4, device=DEVICE).bfloat16()
    on(backend, logits, 4, True, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on(backend, logits, 4, True, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on(backend, logits, 4, True, grad)
    for seed in range(3):
        logits.copy_(random_logits(3000, num_experts, torch.bfloat16, seed=seed))
        graph.replay()
        for actual, wanted in zip(captured, on(backend, logits, 4, True, grad), strict=True):
            assert torch.equal(actual, wanted)


@needs_gpu
def test_compiles_whole(backend: str) -> None:
    logits = random_logits(300, 6, torch.float32).requires_grad_()
    before = dispatch.calls.copy()
    with use_backend(backend):
        routing = Routing(*compiled(route_topk, backend="inductor")(logits, 2))
    (grad,) = torch.autograd.grad(routing.gates[:, 0].sum(), logits)
    assert set(dispatch.calls - before) == {("route_topk", backend), ("route_topk_backward", backend)}
    upstream = torch.tensor([1.0, 0.0], device=DEVICE).expand(300, 2)
    for actual, wanted in zip((*routing, grad), on(backend, logits.detach(), 2, True, upstream), strict=True):
        assert torch.equal(actual, wanted)
