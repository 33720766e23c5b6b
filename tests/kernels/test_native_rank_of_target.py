"""The native rank_of_target against the reference: exactly where scores are exact, within their rounding elsewhere."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_library import needs_library
from native_ranking import DTYPES, Case, cases, check_equals_tie, check_rank, make_case, native_rank, ragged
from torch import Tensor

pytestmark = needs_library

both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(case=cases(), count=st.integers(1, 3))
def test_equals_the_reference(case: Case, count: int) -> None:
    torch.set_num_threads(count)
    check_rank(case)


@both_dtypes
@pytest.mark.parametrize("dim", [1, 33, 128, 257, 512])
@pytest.mark.parametrize("count", [1, 3])
def test_copies_of_one_item_tie_wherever_they_stand(dtype: torch.dtype, dim: int, count: int) -> None:
    torch.set_num_threads(count)
    for num_queries, num_items in ((1, 1), (1, 1001), (3, 33), (29, 545)):
        check_equals_tie(num_queries, num_items, dim, dtype)


@both_dtypes
def test_is_within_the_rounding_of_scores(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(50, 128, generator=generator).to(dtype)
    items = torch.randn(3000, 128, generator=generator).to(dtype)
    targets = torch.arange(50) * 59
    scores = queries.double() @ items.double().T
    own = scores.gather(1, targets[:, None])
    slack = 4 * torch.finfo(torch.float32).eps * 128
    ranks = native_rank(Case(queries, items, targets, None))
    assert (ranks > (scores > own + slack).sum(1)).all()
    assert (ranks <= (scores > own - slack).sum(1)).all()


def rank(scores: tuple[float, ...], target: int, seen: tuple[int, ...] = ()) -> int:
    """Of one query of a block of three, behind 500 items that each of them has seen."""
    items = torch.tensor([*[9.0] * 500, *scores])[:, None]
    left_out = torch.tensor([500 + place for place in seen] + list(range(500)), dtype=torch.int64)
    case = Case(torch.ones(3, 1), items, torch.full((3,), 500 + target), ragged([left_out] * 3))
    ranks = native_rank(case)
    check_rank(case)
    assert (ranks == ranks[0]).all()
    return int(ranks[0])


def test_ties_and_seen_items() -> None:
    scores = (5.0, 4.0, 4.0, 4.0, 2.0)
    assert rank(scores, 1) == 1 + 1 + 1
    assert rank(scores, 1, (2,)) == 1 + 1 + 1
    assert rank(scores, 1, (2, 3)) == 1 + 1
    assert rank(scores, 1, (0, 0, 0, 3, 3, 2)) == 1, "listed thrice, left out once"
    assert rank(scores, 1, (1, 0)) == 1 + 1, "ranked although it was seen"
    assert rank(scores, 4, (0, 1, 2, 3, 4)) == 1
    assert rank((0.0, -0.0, 0.0), 1) == 2


@pytest.mark.parametrize("own", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(own: float) -> None:
    assert rank((own, 1.0, 2.0, 3.0), 0) == 4
    assert rank((own, 1.0, math.nan, 3.0), 0, (0, 1)) == 3
    assert rank((own, own, own), 0, (1, 1)) == 2
    assert rank((1.0, own, own), 0) == (3 if own == math.inf else 1)


@both_dtypes
def test_items_and_queries_with_infinities_among_them(dtype: torch.dtype) -> None:
    case = make_case(20, 300, 40, dtype, most_seen=20)
    case.items[::7, 3] = math.inf
    case.items[5::11, 38] = -math.inf
    case.queries[4, 7] = math.nan
    case.queries[5, 8] = math.inf
    check_rank(case)


def test_every_item_seen_and_one_item_alone() -> None:
    case = make_case(17, 530, 5, torch.float32)
    everything = torch.arange(530).flip(0)
    assert native_rank(case._replace(seen=ragged([everything] * 17))).tolist() == [1] * 17
    assert native_rank(make_case(40, 1, 7, torch.float32)).tolist() == [1] * 40


def test_a_query_that_has_seen_more_than_a_round_sorts_at_once() -> None:
    check_rank(make_case(40, 300, 3, torch.float32, most_seen=160_000))


@both_dtypes
def test_several_rounds_of_queries(dtype: torch.dtype) -> None:
    check_rank(make_case(600, 70, 4200, dtype, most_seen=5))


def test_ranks_do_not_depend_on_the_number_of_threads() -> None:
    """Although it decides which items and queries a thread takes."""
    generator = torch.Generator().manual_seed(1)
    for num_queries, num_items in ((3, 9000), (500, 40), (200, 1500)):
        items = torch.randn(num_items // 2, 48, generator=generator).repeat(2, 1)
        queries = torch.randn(num_queries, 48, generator=generator)
        targets = torch.randint(0, num_items, (num_queries,), generator=generator)
        seen = make_case(num_queries, num_items, 1, torch.float32, most_seen=50).seen
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(native_rank(Case(queries, items, targets, seen)))
        assert all(torch.equal(one, found[0]) for one in found)


@both_dtypes
def test_any_strides_and_int32_offsets(dtype: torch.dtype) -> None:
    case = make_case(20, 300, 40, dtype, most_seen=9)
    assert case.seen is not None
    values, offsets = case.seen
    expected = native_rank(case)

    def twice(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    for items in (case.items.T.contiguous().T, twice(case.items), torch.cat([case.items, case.items], 1)[:, :40]):
        strided = Case(twice(case.queries), items, twice(case.targets), (twice(values), twice(offsets.int())))
        assert torch.equal(native_rank(strided), expected)
        assert torch.equal(native_rank(strided._replace(queries=case.queries.T.contiguous().T)), expected)
    check_rank(case._replace(items=case.items[:1].expand(300, 40)))


def test_items_of_a_memory_mapped_file(tmp_path: Path) -> None:
    case = make_case(30, 2000, 24, torch.float32, most_seen=9)
    path = tmp_path / "items"
    case.items.numpy().tofile(path)
    items = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+", shape=(2000, 24)))
    assert torch.equal(native_rank(case._replace(items=items)), native_rank(case))
