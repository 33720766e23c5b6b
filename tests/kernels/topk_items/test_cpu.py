"""The native topk_items against the reference: exactly where scores are exact, within their rounding elsewhere."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.error_budget import assert_within_budget
from tests.kernels.helpers.native_library import needs_library
from tests.kernels.helpers.native_ranking import DTYPES, NATIVE, cases
from tests.kernels.helpers.ranking import Case, make_case, ragged

pytestmark = needs_library

both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(case=cases(), k=st.one_of(st.integers(1, 20), st.integers(1, 700)), count=st.integers(1, 3))
def test_equals_the_reference(case: Case, k: int, count: int) -> None:
    torch.set_num_threads(count)
    NATIVE.check_topk(case, k)


@both_dtypes
@pytest.mark.parametrize("k", [1, 17, 1000])
def test_equals_the_reference_where_the_best_change_often(dtype: torch.dtype, k: int) -> None:
    """Return ascending scores, which replace the kept items again and again, descending scores, and unordered ones."""
    ascending = torch.arange(6000) - 3000
    for order in (ascending, ascending.flip(0), ascending[torch.randperm(6000)]):
        # Two columns that bfloat16 holds: 64 a + b.
        items = torch.stack([order.div(64, rounding_mode="floor"), order.remainder(64)], 1).to(dtype)
        queries = torch.tensor([[64.0, 1.0], [-64.0, -1.0], [0.0, 1.0], [0.0, 0.0]]).to(dtype)
        case = Case(queries, items, torch.zeros(4, dtype=torch.int64), None)
        NATIVE.check_topk(case, k)
        NATIVE.check_topk(case._replace(seen=ragged([torch.randint(0, 6000, (3000,)) for _ in range(4)])), k)


@both_dtypes
def test_error_budget(dtype: torch.dtype) -> None:
    queries, items = torch.randn(50, 128).to(dtype), torch.randn(3000, 128).to(dtype)
    scores, ids = NATIVE.topk(Case(queries, items, torch.zeros(50, dtype=torch.int64), None), 40)
    exact = queries.double() @ items.double().T
    # Of scores that are nearly equal in float32 either one may come first.
    assert (exact.gather(1, ids) - exact.topk(40).values).abs().max() < 4 * torch.finfo(torch.float32).eps * 128
    assert ids.sort().values.diff().min() > 0
    plain = (queries.float() @ items.float().T).gather(1, ids)
    assert_within_budget(scores, plain, exact.gather(1, ids), "scores")


def best(scores: tuple[float, ...], k: int, seen: tuple[int, ...] = ()) -> tuple[list[float], list[int]]:
    """Return the result of one query in a block of three, after 500 items that all of them have seen."""
    items = torch.tensor([*[9.0] * 500, *scores])[:, None]
    left_out = torch.tensor([500 + place for place in seen] + list(range(500)), dtype=torch.int64)
    case = Case(torch.ones(3, 1), items, torch.zeros(3, dtype=torch.int64), ragged([left_out] * 3))
    values, ids = NATIVE.topk(case, k)
    NATIVE.check_topk(case, k)
    return values[0].tolist(), [place - 500 if place >= 0 else -1 for place in ids[0].tolist()]


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


@both_dtypes
def test_items_and_queries_with_infinities_among_them(dtype: torch.dtype) -> None:
    case = make_case(20, 300, 40, dtype, most_seen=20)
    case.items[::7, 3] = math.inf
    case.items[5::11, 38] = -math.inf
    case.queries[4, 7] = math.nan
    case.queries[5, 8] = math.inf
    for k in (3, 200, 1000):
        NATIVE.check_topk(case, k)


def test_no_queries_no_items_one_item() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for num_queries, num_items in ((0, 5), (3, 0), (0, 0), (40, 1)):
        case = Case(torch.randn(num_queries, 3), torch.ones(num_items, 3), none, ragged([none] * num_queries))
        NATIVE.check_topk(case._replace(queries=torch.ones(num_queries, 3)), 2)


@both_dtypes
def test_several_rounds_of_queries(dtype: torch.dtype) -> None:
    NATIVE.check_topk(make_case(600, 70, 4200, dtype, most_seen=5), 7)
    NATIVE.check_topk(make_case(1200, 1500, 3, dtype, most_seen=5), 1000)
    NATIVE.check_topk(make_case(40, 300, 3, dtype, most_seen=160_000), 5)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """The number of threads decides only which items and queries a thread processes."""
    generator = torch.Generator().manual_seed(1)
    for num_queries, num_items in ((3, 9000), (500, 40), (200, 1500)):
        items = torch.randn(num_items // 2, 48, generator=generator).repeat(2, 1)
        queries = torch.randn(num_queries, 48, generator=generator)
        case = make_case(num_queries, num_items, 1, torch.float32, most_seen=50)._replace(queries=queries, items=items)
        for k in (5, 300):
            found = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                found.append(NATIVE.topk(case, k))
            assert all(torch.equal(scores, found[0][0]) and torch.equal(ids, found[0][1]) for scores, ids in found)


@both_dtypes
def test_any_strides_and_int32_offsets(dtype: torch.dtype) -> None:
    case = make_case(20, 300, 40, dtype, most_seen=9)
    assert case.seen is not None
    values, offsets = case.seen
    expected = NATIVE.topk(case, 33)[1]

    def twice(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    for items in (case.items.T.contiguous().T, twice(case.items), torch.cat([case.items, case.items], 1)[:, :40]):
        strided = Case(twice(case.queries), items, case.targets, (twice(values), twice(offsets.int())))
        assert torch.equal(NATIVE.topk(strided, 33)[1], expected)
        assert torch.equal(NATIVE.topk(strided._replace(queries=case.queries.T.contiguous().T), 33)[1], expected)
    NATIVE.check_topk(case._replace(items=case.items[:1].expand(300, 40)), 33)


def test_items_of_a_memory_mapped_file(tmp_path: Path) -> None:
    case = make_case(30, 2000, 24, torch.float32, most_seen=9)
    path = tmp_path / "items"
    case.items.numpy().tofile(path)
    items = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+", shape=(2000, 24)))
    found, expected = NATIVE.topk(case._replace(items=items), 50), NATIVE.topk(case, 50)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
