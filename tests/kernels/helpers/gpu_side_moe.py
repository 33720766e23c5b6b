"""Checks of side_moe's GPU kernels, for every backend."""

import numpy as np
import torch
from torch import Tensor

from tests.kernels.helpers.gpu_waits import assert_waits_for_nothing
from tests.kernels.helpers.side_level import Level, make_level
from tests.kernels.helpers.side_moe_check import Call, served_results
from tests.kernels.helpers.triton_gpu import DEVICE, ON_GPU
from xsmoe_kernels import Utilization, side_moe, use_backend


def plain_level(
    rows: int, dim: int, experts: int, rank: int, *, one_row: bool = False, dtype: torch.dtype = torch.float32
) -> Level:
    """Return a level on the device, without gradients."""
    level = make_level(rows, dim, experts, rank, one_row=one_row, dtype=dtype, requires_grad=False)
    return Level(*(tensor.to(DEVICE) for tensor in level))


def upstream(y: Tensor) -> Tensor:
    """Return the upstream gradient that `side_moe_check.results` draws."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.device, y.dtype)


def check_the_same_bits_twice(backend: str, dtype: torch.dtype, one_row: bool) -> None:
    """Results do not change from one call to the next."""
    level = plain_level(5000 if ON_GPU else 70, 40, 3, 16, one_row=one_row, dtype=dtype)
    call = Call(num_frozen=1, weighted=True)
    first, second = (served_results(level, call, backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def check_rows_of_any_stride(backend: str, one_row: bool) -> None:
    """Strided and transposed operands give bitwise the results of dense ones."""
    level = plain_level(40, 20, 3, 5, one_row=one_row, dtype=torch.bfloat16)
    expected = served_results(level, Call(num_frozen=1, counted=False), backend)

    def spread(rows: Tensor) -> Tensor:
        wide = rows.new_full((2 * len(rows), rows.shape[1] + 3), float("nan"))
        wide[::2, 2:-1] = rows
        return wide[::2, 2:-1]

    strided = level._replace(x=spread(level.x), backbone=spread(level.backbone))
    transposed = level._replace(
        x=level.x.T.contiguous().T,
        router=level.router.T.contiguous().T,
        down=level.down.mT.contiguous().mT,
        up=level.up.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    )
    for other in (strided, transposed):
        assert not all(tensor.is_contiguous() for tensor in other)
        leaves = [tensor.requires_grad_() for tensor in other]
        with use_backend(backend):
            y = side_moe(*leaves, num_frozen=1)
        gradients = torch.autograd.grad(y, leaves, upstream(y))
        assert torch.equal(y, expected["y"])
        for name, gradient in zip(Level._fields, gradients, strict=True):
            assert torch.equal(gradient, expected["gradient of " + name]), name


def check_places_beyond_two_to_the_31(backend: str) -> None:
    """Row strides may exceed 32 bits."""
    stride = 2**30 + 16
    level = plain_level(3, 16, 2, 4, dtype=torch.float16)
    # Of NumPy's zeros only those pages are there that somebody touches.
    length = 2 * stride + 16
    far = level.x.new_zeros(length) if ON_GPU else torch.from_numpy(np.zeros(length, dtype=np.float16))
    rows = far.as_strided((3, 16), (stride, 1))
    rows.copy_(level.x)
    with use_backend(backend):
        y = side_moe(rows, rows, *level[2:])
        expected = side_moe(level.x, level.x, *level[2:])
    assert torch.equal(y, expected)


def check_a_row_that_is_not_finite_spoils_no_other(backend: str, value: float) -> None:
    """NaN and infinity affect their own rows only."""
    level = plain_level(40, 20, 3, 5)
    clean = served_results(level, Call(needed=(True, True, False, False, False)), backend)
    x = level.x.clone()
    x[7, 3] = value
    spoilt = served_results(level._replace(x=x), Call(needed=(True, True, False, False, False)), backend)
    others = torch.arange(40) != 7
    assert not torch.isfinite(spoilt["y"][7]).any()
    for name in ("y", "gradient of x", "gradient of backbone"):
        assert torch.equal(spoilt[name][others], clean[name][others]), name


def check_large_gradients_in_float16(backend: str, one_row: bool, rows: int, size: float) -> None:
    """Gradients of logits are sums over a row's width and over all rows, which exceed the range of float16."""
    level = plain_level(rows, 64, 3, 16, one_row=one_row, dtype=torch.float16)
    # The backbone is of one sign, so that its logit's gradient passes 65,504; what that is multiplied with is small.
    level = level._replace(x=0.02 * level.x, backbone=level.backbone.abs(), router=0.02 * level.router)
    grad = torch.full_like(level.backbone, size)

    def gradients(of: str) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in level]
        with use_backend(of):
            return torch.autograd.grad(side_moe(*leaves), leaves, grad)

    for name, found, want in zip(Level._fields, gradients(backend), gradients("reference"), strict=True):
        assert want.isfinite().all(), name
        torch.testing.assert_close(found, want, rtol=0.02, atol=0.02 * float(want.abs().max()), msg=name)


def check_logits_without_a_bound_below(backend: str) -> None:
    """The first block of a row's gates is all zeros, and a later one is not."""
    level = plain_level(33, 16, 20, 4)
    router = torch.full_like(level.router, float("-inf"))
    router[17:] = level.router[17:]
    inputs = level._replace(x=level.x.abs() + 0.1, router=router)
    with use_backend(backend):
        y = side_moe(*inputs)
    with use_backend("reference"):
        want = side_moe(*inputs)
    assert want.isfinite().all()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def check_with_opcheck(backend: str, needed: tuple[bool, ...]) -> None:
    """Schema, fake and autograd pass torch.library.opcheck."""
    level = plain_level(6, 16, 3, 4)
    forward = (*level, None, None, None, None, 1, True, True, "gelu", backend)
    torch.library.opcheck(torch.ops.xsmoe.side_moe.default, forward)
    _, gates, hidden, _, _ = torch.ops.xsmoe.side_moe(*forward)
    grad = torch.randn_like(level.backbone)
    backward = (grad, *level, None, None, None, gates, hidden, 1, True, "gelu", *needed, backend)
    torch.library.opcheck(torch.ops.xsmoe.side_moe_backward.default, backward)


def check_compiles_as_one_graph(backend: str) -> None:
    """torch.compile makes one graph, and counters grow as in eager mode."""
    leaves = [tensor.requires_grad_() for tensor in plain_level(33, 16, 3, 4)]
    counters = Utilization(3, DEVICE)

    def step() -> Tensor:
        return side_moe(*leaves, num_frozen=1, utilization=counters).square().sum()

    with use_backend(backend):
        want = torch.autograd.grad(step(), leaves)
        norm = counters.norm.clone()
        counters.reset()
        found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(), leaves)
    for gradient, expected in zip(found, want, strict=True):
        torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(counters.norm, norm)


def check_replays_as_a_cuda_graph(backend: str, dtype: torch.dtype, one_row: bool) -> None:
    """A captured graph reads its inputs again when it is replayed."""
    level = plain_level(2816, 768, 10, 64, one_row=one_row, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in level]
    row_weight = torch.rand(2816, device=DEVICE)
    counters, want_counters = Utilization(10, DEVICE), Utilization(10, DEVICE)
    grad = upstream(level.backbone)

    def step(counted: Utilization) -> tuple[Tensor, ...]:
        y = side_moe(*leaves, num_frozen=9, utilization=counted, row_weight=row_weight)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    with use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(counters)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(counters)
        with torch.no_grad():
            level.x.copy_(torch.randn_like(level.x))
            level.down[9].mul_(0.5)
        counters.reset()
        graph.replay()
        for found, want in zip(captured, step(want_counters), strict=True):
            assert torch.equal(found, want)
    assert torch.equal(counters.norm, want_counters.norm)


def check_never_waits_for_the_device(backend: str) -> None:
    """No call of torch synchronizes."""
    leaves = [tensor.requires_grad_() for tensor in plain_level(2816, 768, 10, 64, dtype=torch.bfloat16)]
    counters = Utilization(10, DEVICE)

    def step() -> None:
        y = side_moe(*leaves, num_frozen=9, utilization=counters)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    with use_backend(backend):
        assert_waits_for_nothing(step)


def check_runs_on_the_current_stream(backend: str) -> None:
    """Results on a side stream are equal."""
    level, call = plain_level(2816, 768, 10, 64), Call(num_frozen=9)
    want = served_results(level, call, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # What is launched elsewhere would read its inputs too early.
        torch.cuda._sleep(100_000_000)
        late = Level(*(tensor.clone() for tensor in level))
        found = served_results(late, call, backend)
    stream.synchronize()
    for name, value in want.items():
        assert torch.equal(found[name], value), name
