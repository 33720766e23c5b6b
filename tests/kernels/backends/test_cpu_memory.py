"""Memory of the native kernels: all of it comes from torch, and none grows with the product of E, D and N."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.helpers.allocations import largest_allocation, peak_allocation
from tests.kernels.helpers.native_library import needs_library
from tests.kernels.helpers.native_ranking import NATIVE
from tests.kernels.helpers.ranking import Case
from tests.kernels.helpers.side_level import Level, make_level
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, use_backend

pytestmark = needs_library

DTYPES = (torch.float32, torch.bfloat16)


def test_outputs_and_scratch_are_filled_with_nan_while_tests_run() -> None:
    """The fill covers what the kernels allocate, so that the other tests detect entries that they do not write."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.are_deterministic_algorithms_enabled()
    level = make_level(5, 7, 2, 3, dtype=torch.float32)
    with torch.profiler.profile() as profile, use_backend("native"):
        side_moe(*level, utilization=Utilization(2), recompute=False).sum().backward()
    for operator in ("xsmoe_native::side_moe", "xsmoe_native::side_moe_backward"):
        (event,) = (e for e in profile.events() if e.name == operator)
        inside = [child for child in descendants(event) if child.name in ("aten::empty", "aten::fill_")]
        empty, filled = ([c.name for c in inside].count(name) for name in ("aten::empty", "aten::fill_"))
        assert empty >= 5, f"{operator} takes its results and its scratch memory from torch"
        assert filled == empty, f"{operator}: {filled} of {empty} are filled"


def descendants(event: torch.autograd.profiler_util.FunctionEvent) -> list[torch.autograd.profiler_util.FunctionEvent]:
    return [e for child in event.cpu_children for e in (child, *descendants(child))]


def saved_bytes(level: Level, frozen: FrozenExperts, recompute: bool) -> int:
    """Return the bytes that two levels save for backward beyond inputs, frozen experts and prepacked weights."""
    pack = frozen.pack()
    assert pack is not None
    owned = {t.untyped_storage().data_ptr() for t in (*level, frozen.down, frozen.up, pack)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    counters = Utilization(len(level.router) - 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), use_backend("native"):
        first = side_moe(*level, frozen=frozen, utilization=counters, recompute=recompute)
        side_moe(first, *level[1:], frozen=frozen, utilization=counters, recompute=recompute)
    assert level.x.untyped_storage().data_ptr() in kept
    return sum(size for pointer, size in kept.items() if pointer not in owned)


def test_saves_little_for_backward_at_the_size_of_the_paper() -> None:
    rows, dim, rank, experts = 2816, 768, 64, 10
    level = make_level(rows, dim, experts, rank, dtype=torch.float32, requires_grad=False)
    frozen = FrozenExperts(level.down[:9].clone(), level.up[:9].clone())
    level = Level(*(t.clone().requires_grad_() for t in level._replace(down=level.down[9:], up=level.up[9:])))
    gates, between = rows * (experts + 1) * 4, rows * dim * 4
    recomputed = saved_bytes(level, frozen, recompute=True)
    assert recomputed == 2 * gates + between
    assert recomputed < 10 * 2**20
    assert saved_bytes(level, frozen, recompute=False) == recomputed + 2 * rows * experts * rank * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counted", [False, True])
def test_memory_does_not_grow_with_the_product_of_experts_and_width(dtype: torch.dtype, counted: bool) -> None:
    rows, dim, rank = 6000, 256, 16

    def step(experts: int) -> Callable[[], None]:
        level = make_level(rows, dim, experts, rank, dtype=dtype)
        counters = Utilization(experts) if counted else None

        def run() -> None:
            with use_backend("native"):
                side_moe(*level, utilization=counters, num_frozen=experts - 1, recompute=True).sum().backward()

        return run

    row_bytes = rows * dim * dtype.itemsize
    assert largest_allocation(step(32)) <= row_bytes, "y, dx and dbackbone are the largest"
    few, many = peak_allocation(step(2)), peak_allocation(step(32))
    # Packed weights, their gradients and scratch for a tile of rows grow with E; N * E * D would be 30 times row_bytes.
    assert many - few < 2 * row_bytes


@pytest.mark.parametrize("threads", [1, 2])
def test_rankings_of_a_large_catalogue_need_little_memory(threads: int) -> None:
    """Neither scores nor items are copied: all scores would be 800 MB, the items are 51 MB."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = torch.arange(100_000).flip(0), torch.arange(2001) * 50
        case = Case(torch.randn(2000, 128), torch.randn(100_000, 128), torch.arange(2000), seen)
        assert peak_allocation(lambda: NATIVE.rank(case)) < 8 << 20
        for k in (10, 1000):
            results = 2000 * k * (4 + 8)
            assert peak_allocation(lambda k=k: NATIVE.topk(case, k)) < results + threads * (12 << 20)
    finally:
        torch.set_num_threads(before)
