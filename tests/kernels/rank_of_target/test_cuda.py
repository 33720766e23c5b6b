"""The CUDA kernels of rank_of_target against the reference: on a GPU, or on a CPU that emulates one."""

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.kernels.helpers import ranking
from tests.kernels.helpers.cuda_library import DEVICE, ON_GPU, needs_cuda_kernels, needs_gpu
from tests.kernels.helpers.rank_checks import GpuRankChecks, sizes
from tests.kernels.helpers.ranking import Case, Served, make_case, on, ragged
from xsmoe_kernels import BackendUnavailable, rank_of_target, use_backend
from xsmoe_kernels.ops.scoring import item_scores
from xsmoe_kernels.runtime import dispatch

pytestmark = needs_cuda_kernels

CUDA = Served("cuda", DEVICE)
MARKS = 1 << 17
"""Items that are looked for at a time among what a query has seen."""


@settings(deadline=None, derandomize=True, max_examples=400 if ON_GPU else 60)
@given(
    # Around blocks of 32 and of 128 queries, tiles of 128 items, and steps of 16 numbers.
    case=ranking.cases(
        num_queries=sizes([0, 1, 2, 31, 32, 33, 129], [64, 65, 128, 300]),
        num_items=sizes([1, 2, 127, 128, 129, 300], [1000, 9000]),
        dim=sizes([1, 2, 4, 15, 16, 17, 32, 33, 36], [64, 100, 128, 257, 768]),
        most_seen=[None, 0, 3, 200],
        dtypes=[torch.float32],
        device=DEVICE,
    )
)
def test_equals_the_reference(case: Case) -> None:
    CUDA.check_rank(case)


class TestRanks(GpuRankChecks):
    served, dtypes, far_dtype = CUDA, (torch.float32,), torch.float32
    tie_dims = (1, 16, 33, 52, *((64, 128, 257, 768) if ON_GPU else ()))
    tie_sizes = ((1, 1), (3, 131), (35, 259), *(((300, 3001),) if ON_GPU else ()))
    rounded, wide, before = (20, 9000 if ON_GPU else 300, 40), 140, 150


def chained_ranks(case: Case, seen: list[set[int]]) -> list[int]:
    """Return ranks by scores that are summed in ascending order, with one rounding per step."""
    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    ranks, items = [], case.items.tolist()
    for query, target, left_out in zip(case.queries.tolist(), case.targets.tolist(), seen, strict=True):
        scores = []
        for item in items:
            score = 0.0
            for left, right in zip(query, item, strict=True):
                score = fmaf(left, right, score)
            scores.append(score)
        others = [score for place, score in enumerate(scores) if place not in left_out | {target}]
        higher, equal = (sum(map(compare, others)) for compare in (scores[target].__lt__, scores[target].__eq__))
        ranks.append(1 + higher + math.ceil(equal / 2))
    return ranks


@pytest.mark.parametrize("num_queries", [5, 40])
@pytest.mark.parametrize("dim", [33, 40])
def test_every_score_is_one_chain_wherever_it_is_computed(num_queries: int, dim: int) -> None:
    """Scores of a tile, of a target and of seen items are summed in one order. Items are shuffled copies of the same
    numbers, and no other order of summation gives this ranking."""
    generator = torch.Generator().manual_seed(dim)
    numbers = torch.randn(dim, generator=generator)
    items = torch.stack([numbers[torch.randperm(dim, generator=generator)] for _ in range(150)])
    queries = torch.randn(num_queries, 1, generator=generator).expand(num_queries, dim)
    targets = torch.randint(0, 150, (num_queries,), generator=generator)
    seen = torch.randint(0, 150, (num_queries, 60), generator=generator)
    case = Case(queries.contiguous(), items, targets, ragged([*seen]))
    expected = chained_ranks(case, [set(row) for row in seen.tolist()])
    assert CUDA.rank(on(DEVICE, case)).tolist() == expected
    others = chained_ranks(case._replace(items=items.flip(1)), [set(row) for row in seen.tolist()])
    assert sum(one != other for one, other in zip(expected, others, strict=True)) > num_queries // 2


@pytest.mark.parametrize("num_queries", [20, 150])
def test_ranks_depend_neither_on_slices_nor_on_the_order_of_blocks(
    num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CUDA.random_case(num_queries, 700, 20, torch.float32)
    expected = CUDA.rank(case)
    for order in ("ascending", "descending"):
        for multiprocessors in (1, 2, 5):
            monkeypatch.setenv("XSMOE_EMULATED_ORDER", order)
            monkeypatch.setenv("XSMOE_EMULATED_MULTIPROCESSORS", str(multiprocessors))
            assert torch.equal(CUDA.rank(case), expected)


def test_seen_items_of_a_catalogue_that_is_looked_through_in_windows() -> None:
    num_items = MARKS + 3000
    edges = torch.tensor([0, 1, MARKS - 1, MARKS, MARKS + 1, num_items - 1])
    case = make_case(3, num_items, 1, torch.float32, most_seen=500)
    case.targets[:] = edges[[0, 3, 5]]
    seen = ragged([edges, edges.repeat(50), torch.randint(0, num_items, (900,)).repeat(2)])
    CUDA.check_rank(case._replace(seen=seen))


def test_rows_that_begin_anywhere() -> None:
    case = on(DEVICE, make_case(33, 140, 24, torch.float32, most_seen=9))
    expected = CUDA.check_rank(case)

    def shifted(rows: Tensor, by: int, stride: int) -> Tensor:
        wide = torch.full((len(rows) * stride + by,), torch.nan, device=DEVICE)
        return wide[by:].view(len(rows), stride)[:, :24].copy_(rows)

    for by, stride in ((0, 28), (1, 24), (4, 25), (3, 27)):
        assert torch.equal(CUDA.rank(case._replace(queries=shifted(case.queries, by, stride))), expected)
        assert torch.equal(CUDA.rank(case._replace(items=shifted(case.items, by, stride))), expected)


def test_indices_out_of_range_do_not_spoil_other_ranks() -> None:
    """Nothing checks these values on a GPU. They must not cause accesses outside a tensor."""
    case = on(DEVICE, make_case(4, 140, 24, torch.float32))
    values = torch.tensor([7, -1, 140, 1 << 40, -(1 << 40), 9, 7], device=DEVICE)
    cleaned = ragged([torch.tensor([7]), torch.tensor([9, 7]), torch.arange(0), torch.arange(0)])
    expected = CUDA.rank(on(DEVICE, case._replace(seen=cleaned)))
    targets = case.targets.clone()
    targets[2:] = torch.tensor([-1, 140])
    offsets = torch.tensor([-9, 5, 1000, 1000, 5], device=DEVICE)
    ranks = torch.ops.xsmoe_cuda.rank_of_target(case.queries, case.items, targets, values, offsets)
    assert ranks[:2].tolist() == expected[:2].tolist()
    assert ranks[2:].tolist() == [140, 140]


def test_other_dtypes_and_more_items_are_left_to_others() -> None:
    case = on(DEVICE, make_case(4, 140, 24, torch.bfloat16))
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match=r"support torch\.float32, not torch\.bfloat16"):
        rank_of_target(*case)
    device, meta = torch.device("cuda"), torch.empty(2, 1, device="meta")
    for more, reason in ((0, ""), (1, "items has 2147482625 rows, but the cuda kernels support at most 2147482624")):
        items = torch.empty(item_scores.MOST_ITEMS + more, 1, device="meta")
        found = dispatch.unavailable_reason(
            "rank_of_target", "cuda", device, torch.float32, meta, items, meta, None, None
        )
        assert (found or "").split(";")[0] == reason


def test_products_in_tf32_are_left_to_triton() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        reasons = [
            dispatch.unavailable_reason("rank_of_target", "cuda", torch.device(device), torch.float32)
            for device in ("cuda", "cpu")
        ]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert "fp32_precision is tf32" in (reasons[0] or "")
    assert "tf32" not in (reasons[1] or "")


@needs_gpu
def test_runs_on_the_current_stream() -> None:
    case = CUDA.random_case(300, 5000, 64, torch.float32)
    expected = CUDA.rank(case)
    torch.cuda.synchronize()
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    done.record()
    with torch.cuda.stream(side):
        ranks = CUDA.rank(case)
    side.synchronize()
    assert not done.query(), "it waited for the default stream"
    with torch.cuda.stream(side):
        assert torch.equal(ranks, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors() -> None:
    case = CUDA.random_case(300, 5000, 64, torch.float32)
    expected = CUDA.rank(case)
    with torch.cuda.device(0):
        assert torch.equal(CUDA.rank(on(torch.device("cuda:1"), case)).cpu(), expected.cpu())
        assert torch.cuda.current_device() == 0


@needs_gpu
def test_scratch_is_bounded() -> None:
    """The workspace is two numbers per query, or 64 MiB."""
    num_queries = 5_000_000
    queries, items = torch.ones(num_queries, 4, device=DEVICE), torch.ones(10_000, 4, device=DEVICE)
    targets = torch.zeros(num_queries, dtype=torch.int64, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    CUDA.rank(Case(queries, items, targets, None))
    assert torch.cuda.max_memory_allocated() - before < (8 + 4) * num_queries + (65 << 20)
