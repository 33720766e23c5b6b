"""The native rank_of_target against the reference: exactly where scores are exact, within their rounding elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.native_library import needs_library
from tests.kernels.helpers.native_ranking import DTYPES, NATIVE, cases, check_equals_tie
from tests.kernels.helpers.rank_checks import RankChecks
from tests.kernels.helpers.ranking import Case, make_case

pytestmark = needs_library

both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(case=cases(), count=st.integers(1, 3))
def test_equals_the_reference(case: Case, count: int) -> None:
    torch.set_num_threads(count)
    NATIVE.check_rank(case)


class TestRanks(RankChecks):
    served, dtypes = NATIVE, DTYPES
    tie_dims, tie_sizes = (1, 33, 128, 257, 512), ((1, 1), (1, 1001), (3, 33), (29, 545))
    rounded, wide, before = (50, 3000, 128), 530, 500


@both_dtypes
@pytest.mark.parametrize("dim", TestRanks.tie_dims)
@pytest.mark.parametrize("count", [1, 3])
def test_copies_tie_on_any_number_of_threads(dtype: torch.dtype, dim: int, count: int) -> None:
    torch.set_num_threads(count)
    for num_queries, num_items in TestRanks.tie_sizes:
        check_equals_tie(num_queries, num_items, dim, dtype)


def test_a_query_that_has_seen_more_than_a_round_sorts_at_once() -> None:
    NATIVE.check_rank(make_case(40, 300, 3, torch.float32, most_seen=160_000))


@both_dtypes
def test_several_rounds_of_queries(dtype: torch.dtype) -> None:
    NATIVE.check_rank(make_case(600, 70, 4200, dtype, most_seen=5))


def test_ranks_do_not_depend_on_the_number_of_threads() -> None:
    """The number of threads decides only which items and queries a thread processes."""
    generator = torch.Generator().manual_seed(1)
    for num_queries, num_items in ((3, 9000), (500, 40), (200, 1500)):
        items = torch.randn(num_items // 2, 48, generator=generator).repeat(2, 1)
        queries = torch.randn(num_queries, 48, generator=generator)
        targets = torch.randint(0, num_items, (num_queries,), generator=generator)
        seen = make_case(num_queries, num_items, 1, torch.float32, most_seen=50).seen
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(NATIVE.rank(Case(queries, items, targets, seen)))
        assert all(torch.equal(one, found[0]) for one in found)


@both_dtypes
def test_any_strides_and_int32_offsets(dtype: torch.dtype) -> None:
    case = make_case(20, 300, 40, dtype, most_seen=9)
    assert case.seen is not None
    values, offsets = case.seen
    expected = NATIVE.rank(case)

    def twice(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    for items in (case.items.T.contiguous().T, twice(case.items), torch.cat([case.items, case.items], 1)[:, :40]):
        strided = Case(twice(case.queries), items, twice(case.targets), (twice(values), twice(offsets.int())))
        assert torch.equal(NATIVE.rank(strided), expected)
        assert torch.equal(NATIVE.rank(strided._replace(queries=case.queries.T.contiguous().T)), expected)
    NATIVE.check_rank(case._replace(items=case.items[:1].expand(300, 40)))


def test_items_of_a_memory_mapped_file(tmp_path: Path) -> None:
    case = make_case(30, 2000, 24, torch.float32, most_seen=9)
    path = tmp_path / "items"
    case.items.numpy().tofile(path)
    items = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+", shape=(2000, 24)))
    assert torch.equal(NATIVE.rank(case._replace(items=items)), NATIVE.rank(case))
