"""The Triton kernels of topk_items against the reference: in Triton's interpreter, or on a GPU if there is one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.error_budget import assert_within_budget
from tests.kernels.helpers.ranking import Case, captured, make_case, on, ragged
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
from tests.kernels.helpers.triton_ranking import TRITON, cases
from xsmoe_kernels import topk_items, use_backend
from xsmoe_kernels.ops.topk_items import triton_launchers
from xsmoe_kernels.runtime import dispatch

pytestmark = [
    needs_triton,
    # NumPy's, of the interpreter: products of infinity and zero.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@settings(deadline=None, derandomize=True, max_examples=400 if ON_GPU else 16)
@given(case=cases(), k=st.sampled_from([1, 2, 3, 10, 16, 17, 40, *((200, 1000, 1300) if ON_GPU else ())]))
def test_equals_the_reference(case: Case, k: int) -> None:
    TRITON.check_topk(case, k)


@pytest.mark.parametrize("k", [1, 17, *((300, 1000, 1024, 1025, 5000) if ON_GPU else ())])
def test_equals_the_reference_where_the_best_change_often(k: int) -> None:
    """Return ascending scores, which replace the kept items again and again, descending scores, and unordered ones."""
    num_items = 6000 if ON_GPU else 150
    ascending = torch.arange(num_items) - num_items // 2
    for order in (ascending, ascending.flip(0), ascending[torch.randperm(num_items)]):
        # Two columns that bfloat16 holds: 64 a + b.
        items = torch.stack([order.div(64, rounding_mode="floor"), order.remainder(64)], 1).bfloat16()
        queries = torch.tensor([[64.0, 1.0], [-64.0, -1.0], [0.0, 1.0], [0.0, 0.0]]).bfloat16()
        seen = ragged([torch.randint(0, num_items, (num_items // 4,)) for _ in range(4)])
        TRITON.check_topk(Case(queries, items, torch.zeros(4, dtype=torch.int64), seen), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget(dtype: torch.dtype) -> None:
    num_items = 5000 if ON_GPU else 200
    case = TRITON.random_case(10, num_items, 128 if ON_GPU else 40, dtype, most_seen=None)
    scores, ids = TRITON.topk(case, 24)
    exact = case.queries.double() @ case.items.double().T
    # Of scores that are nearly equal in float32 either one may come first.
    slack = 4 * torch.finfo(torch.float32).eps * case.queries.shape[1]
    assert (exact.gather(1, ids) - exact.topk(24).values).abs().max() < slack
    assert ids.sort().values.diff().min() > 0
    plain = (case.queries.float() @ case.items.float().T).gather(1, ids)
    assert_within_budget(scores, plain, exact.gather(1, ids), "scores")


def best(scores: tuple[float, ...], k: int, seen: tuple[int, ...] = ()) -> tuple[list[float], list[int]]:
    """Return the result of one query in a block of three, after 40 items that all of them have seen."""
    items = torch.tensor([*[9.0] * 40, *scores])[:, None]
    left_out = torch.tensor([40 + place for place in seen] + list(range(40)), dtype=torch.int64)
    case = Case(torch.ones(3, 1), items, torch.zeros(3, dtype=torch.int64), ragged([left_out] * 3))
    values, ids = TRITON.check_topk(case, k)
    return values[0].tolist(), [place - 40 if place >= 0 else -1 for place in ids[0].tolist()]


def test_ties_seen_items_and_missing_places() -> None:
    assert best((1.0, 3.0, 1.0, 3.0, 1.0, 2.0), 4) == ([3.0, 3.0, 2.0, 1.0], [1, 3, 5, 0])
    assert best((0.0, -0.0, 0.0), 2) == ([0.0, 0.0], [0, 1])
    assert best((1.0,) * 9, 9)[1] == list(range(9))
    assert best((5.0, 4.0, 3.0), 2, (0, 0)) == ([4.0, 3.0], [1, 2])
    assert best((5.0, 4.0, 3.0), 4, (0, 2)) == ([4.0, *[-math.inf] * 3], [1, -1, -1, -1])
    assert best((5.0, 4.0), 2, (0, 1)) == ([-math.inf] * 2, [-1] * 2)
    assert best((-1.0, -3.0, -2.0), 3) == ([-1.0, -2.0, -3.0], [0, 2, 1])


def test_scores_that_are_not_finite() -> None:
    scores = (1.0, math.nan, math.inf, -math.inf, 2.0, math.inf)
    assert best(scores, 6) == ([math.inf, math.inf, 2.0, 1.0, -math.inf, -math.inf], [2, 5, 4, 0, -1, -1])
    assert best((math.nan, -math.inf), 1) == ([-math.inf], [-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_items_and_queries_with_infinities_among_them(dtype: torch.dtype) -> None:
    case = make_case(10, 100, 40, dtype, most_seen=20)
    case.items[::7, 3] = math.inf
    case.items[5::11, 38] = -math.inf
    case.queries[4, 7] = math.nan
    case.queries[5, 8] = math.inf
    for k in (3, 120):
        TRITON.check_topk(case, k)


def test_neighbouring_scores_keep_their_order() -> None:
    tiny, next_to_one = 1e-45, 1 + torch.finfo(torch.float32).eps
    scores = torch.tensor([1, next_to_one, 1, -1, -next_to_one, -tiny, 0, tiny, -0.0, 3e38, -3e38])
    case = Case(torch.ones(2, 1), scores[:, None], torch.zeros(2, dtype=torch.int64), None)
    if ON_GPU:  # whose products may flush numbers that small
        scores[[5, 7]] = torch.tensor([-1e-30, 1e-30])
    assert TRITON.check_topk(case, 11)[1][0].tolist() == [9, 1, 0, 2, 7, 6, 8, 5, 3, 4, 10]


def test_no_queries_no_items_one_item() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for num_queries, num_items in ((0, 5), (3, 0), (0, 0), (40, 1)):
        case = Case(torch.ones(num_queries, 3), torch.ones(num_items, 3), none, ragged([none] * num_queries))
        TRITON.check_topk(case, 2)
        TRITON.check_topk(case._replace(seen=None), 2)


def test_rows_of_no_numbers() -> None:
    assert TRITON.check_topk(make_case(3, 40, 0, torch.float32), 3)[1].tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("places, workspace", [(16, 1 << 24), (1024, 1), (16, 5 * 16 * 32)])
def test_several_rounds_over_parts_of_queries_and_items(
    places: int, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes may have different widths; the last one is narrow."""
    case = make_case(33, 105, 3, torch.float32, most_seen=20)
    wide = make_case(2, 170, 3, torch.float32, most_seen=20)
    monkeypatch.setattr(triton_launchers, "MOST_PLACES", places)
    monkeypatch.setattr(triton_launchers, "WORKSPACE", workspace * (16 if ON_GPU else 1))
    TRITON.check_topk(case, 20)
    TRITON.check_topk(wide, 33)


def test_a_slice_ends_with_its_part_of_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part has three tiles and a slice two: the second slice must not include the next part's tile."""
    monkeypatch.setattr(triton_launchers, "PROGRAMS", 2)
    monkeypatch.setattr(triton_launchers, "WORKSPACE", 3 * 128 * 128 if ON_GPU else 3 * 16 * 32)
    TRITON.check_topk(make_case(2, 1200 if ON_GPU else 300, 3, torch.float32, most_seen=20), 20)


def test_the_last_round_finds_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launchers, "MOST_PLACES", 16)
    everything = ragged([torch.arange(70), torch.arange(5, 70), torch.arange(20, 70)])
    case = Case(torch.ones(3, 1), torch.ones(70, 1), torch.zeros(3, dtype=torch.int64), everything)
    ids = TRITON.check_topk(case, 60)[1]
    assert (ids >= 0).sum(1).tolist() == [0, 5, 20]


@pytest.mark.parametrize("slice_blocks, k", [(1, 3), (2, 20)])
def test_lists_that_are_cut_into_slices(slice_blocks: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(3, 9000 if ON_GPU else 200, 5, torch.float32, most_seen=30)
    monkeypatch.setattr(triton_launchers, "SLICE_BLOCKS", slice_blocks)
    TRITON.check_topk(case, k)


@pytest.mark.parametrize("num_queries, num_items, k", [(1, 5_000_000, 10), (2000, 100_000, 1000), (10**6, 7, 3)])
def test_memory_is_bounded(num_queries: int, num_items: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any sizes, no tensor of a launch other than the results and inputs is larger than the workspace."""
    from xsmoe_kernels.triton_utils import kernel_helpers

    largest = 0

    def look(kernel: object, grid: object, device: object, arguments: dict[str, object], *rest: object) -> None:
        nonlocal largest
        for name in ("candidates", "source") if "source" in arguments else ("scores",):
            tensor = arguments[name]
            assert isinstance(tensor, torch.Tensor)
            if tensor.shape != (num_queries, k) and tensor.shape != arguments["scores"].shape:  # type: ignore[attr-defined]
                largest = max(largest, tensor.numel() * tensor.element_size())

    monkeypatch.setattr(kernel_helpers, "launch", look)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    queries, items = torch.ones(1, 1).expand(num_queries, 16), torch.ones(1, 1).expand(num_items, 16)
    with use_backend("triton"):
        topk_items(queries.to(DEVICE), items.to(DEVICE), k, None)
    assert 1 << 20 < largest <= 130 << 20


def test_is_deterministic() -> None:
    case = TRITON.random_case(20, 100, 48, torch.float32)
    first, second = TRITON.topk(case, 10), TRITON.topk(case, 10)
    assert all(torch.equal(*values) for values in zip(first, second, strict=True))


def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TRITON.random_case(20, 100, 48, torch.float32)
    expected = TRITON.topk(case, 10)
    reverse_programs(monkeypatch)
    assert all(torch.equal(*values) for values in zip(TRITON.topk(case, 10), expected, strict=True))


def test_autocast() -> None:
    case = TRITON.random_case(5, 70, 17, torch.float32)
    narrow = case._replace(queries=case.queries.bfloat16(), items=case.items.bfloat16())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(TRITON.topk(case, 4)[1], TRITON.topk(narrow, 4)[1])


def test_places_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(18, 40, 16, torch.float16, most_seen=9)
    expected = TRITON.check_topk(case, 5)
    case = on(DEVICE, case)
    leave_memory_alone(monkeypatch)
    far = case._replace(queries=spread(case.queries, (2**31 // 14, 1)), items=spread(case.items, (2**31 // 30, 1)))
    assert all(torch.equal(*values) for values in zip(TRITON.topk(far, 5), expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries, k", [(500, 10), (3, 1000)])
def test_waits_for_nothing_and_is_captured_by_a_graph(num_queries: int, k: int, dtype: torch.dtype) -> None:
    case = TRITON.random_case(num_queries, 200_000, 128, dtype)
    assert case.seen is not None
    graph, found = captured(lambda: TRITON.topk(case, k))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        case.queries.copy_(torch.randn(case.queries.shape, generator=generator))
        case.seen[0].copy_(torch.randint(0, 200_000, (len(case.seen[0]),), generator=generator))
        graph.replay()
        assert all(torch.equal(*values) for values in zip(found, TRITON.topk(case, k), strict=True))


@needs_gpu
def test_compiles_whole() -> None:
    case = TRITON.random_case(300, 5000, 64, torch.float32)
    before = dispatch.calls.copy()
    found = compiled(topk_items, backend="inductor")(case.queries, case.items, 10, case.seen)
    assert set(dispatch.calls - before) == {("topk_items", "triton")}
    assert all(torch.equal(*values) for values in zip(found, TRITON.topk(case, 10), strict=True))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries, num_items, dim", [(1, 300_000, 128), (2000, 100_000, 128), (300, 50_000, 100)])
@pytest.mark.parametrize("k", [10, 1000, 3000])
def test_large_sizes(num_queries: int, num_items: int, dim: int, k: int, dtype: torch.dtype) -> None:
    # Exact in float32, whatever the order: a score is a sum of `dim` numbers of at most 4.
    TRITON.check_topk(make_case(num_queries, num_items, dim, dtype, most_seen=300), k)
