"""rank_of_target against a loop over items."""

import math
import re
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.allocations import largest_allocation
from tests.kernels.helpers.compilation import compiled, unbacked
from xsmoe_kernels.ops.rank_of_target import rank_of_target
from xsmoe_kernels.ops.scoring import item_scores
from xsmoe_kernels.runtime import dispatch

Seen = tuple[Tensor, Tensor] | None


def loop(queries: Tensor, items: Tensor, targets: Tensor, seen: Seen) -> list[int]:
    """Compute ranks item by item, in Python floats."""
    ranks = []
    for m, target in enumerate(targets.tolist()):
        left_out = {target}
        if seen is not None:
            left_out |= set(seen[0][int(seen[1][m]) : int(seen[1][m + 1])].tolist())
        scores = [sum(a * b for a, b in zip(queries[m].tolist(), item, strict=True)) for item in items.tolist()]
        others = [score for i, score in enumerate(scores) if i not in left_out]
        if math.isfinite(scores[target]):
            higher = sum(score > scores[target] for score in others)
            equal = sum(score == scores[target] for score in others)
            ranks.append(1 + higher + math.ceil(equal / 2))
        else:
            ranks.append(1 + len(others))
    return ranks


def scored(*scores: float) -> tuple[Tensor, Tensor]:
    """Return one query, and items with these scores for it."""
    return torch.ones(1, 1), torch.tensor(scores)[:, None]


def rank(scores: tuple[float, ...], target: int, seen: list[int] | None = None) -> int:
    ragged = None if seen is None else (torch.tensor(seen, dtype=torch.int64), torch.tensor([0, len(seen)]))
    return int(rank_of_target(*scored(*scores), torch.tensor([target]), ragged))


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Seen]:
    num_queries, num_items, dim = draw(st.integers(0, 8)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    # Small integers: the scores are exact, and many of them are equal.
    queries, items = integers(-2, 3, num_queries, dim).float(), integers(-2, 3, num_items, dim).float()
    targets = integers(0, num_items, num_queries)
    if not draw(st.booleans()):
        return queries, items, targets, None
    # The first and the last values belong to nobody.
    lengths = integers(0, 5, num_queries + 2)
    bounds = lengths.cumsum(0)
    return queries, items, targets, (integers(0, num_items, int(bounds[-1])), bounds[:-1])


# The reference finds a query's seen items in two ways; the second is for devices whose offsets it must not read.
both_ways = pytest.mark.parametrize("reads_offsets", [True, False])


def going(reads_offsets: bool) -> Any:
    span = item_scores._span if reads_offsets else lambda rows, values, offsets: (0, len(values))
    return mock.patch.object(item_scores, "_span", span)


@both_ways
@settings(deadline=None, derandomize=True, max_examples=60)
@given(case=catalogues(), tile=st.sampled_from([1, 30, 1 << 21]))
def test_equals_a_loop_over_items(reads_offsets: bool, case: Any, tile: int) -> None:
    with mock.patch.object(item_scores, "TILE", tile), going(reads_offsets):
        assert rank_of_target(*case).tolist() == loop(*case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    queries, items = torch.randn(9, 16).to(dtype), torch.randn(40, 16).to(dtype)
    targets = torch.arange(9)
    # Scores of bfloat16 inputs are summed in float32: no ties that rounding the scores to bfloat16 would make.
    assert rank_of_target(queries, items, targets, None).tolist() == loop(queries, items, targets, None)


@pytest.mark.parametrize("num_equal, expected", [(0, 1), (1, 2), (2, 2), (3, 3), (4, 3)], ids=lambda value: str(value))
def test_ties_share_the_places_between_them_rounded_up(num_equal: int, expected: int) -> None:
    assert rank((1.0, *[1.0] * num_equal, 0.0), 0) == expected
    assert rank((2.0, *[1.0] * num_equal, 0.0, 1.0), num_equal + 2) == expected + 1


def test_items_equal_to_the_target_tie_with_it_in_any_catalogue() -> None:
    items = torch.randn(1, 33).expand(1001, 33)
    assert rank_of_target(torch.randn(3, 33), items, torch.tensor([0, 500, 1000]), None).tolist() == [501] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tile", "num_queries"), [(1 << 21, 1), (2 * 1001, 3), (1, 2)])
def test_items_equal_to_the_target_tie_with_it_where_a_tile_has_one_row(
    dtype: torch.dtype, tile: int, num_queries: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    for dim in (3, 33, 512):
        items = torch.randn(1, dim, generator=generator).to(dtype).expand(1001, dim).contiguous()
        queries = torch.randn(num_queries, dim, generator=generator).to(dtype)
        for target in (0, 996, 1000):
            with mock.patch.object(item_scores, "TILE", tile):
                ranks = rank_of_target(queries, items, torch.full((num_queries,), target), None)
            assert ranks.tolist() == [501] * num_queries


def test_seen_items_do_not_count_and_the_target_always_does() -> None:
    scores = (5.0, 4.0, 3.0, 2.0)
    assert rank(scores, 3) == 4
    assert rank(scores, 3, [0]) == 3
    assert rank(scores, 3, [0, 0, 0]) == 3, "listed thrice, left out once"
    assert rank(scores, 3, [3, 1]) == 3, "ranked although it was seen"
    assert rank(scores, 3, []) == 4
    assert rank(scores, 3, [0, 1, 2, 3]) == 1


@pytest.mark.parametrize("own", [math.nan, math.inf, -math.inf])
def test_a_target_whose_score_is_not_finite_ranks_last(own: float) -> None:
    assert rank((own, 1.0, 2.0, 3.0), 0) == 4
    assert rank((own, 1.0, math.nan, 3.0), 0, [0, 1]) == 3


def test_other_scores_that_are_not_finite() -> None:
    assert rank((1.0, math.nan, math.nan), 0) == 1
    assert rank((1.0, math.inf, -math.inf), 0) == 2


def test_no_queries() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for num_items in (0, 5):
        items = torch.randn(num_items, 3)
        assert rank_of_target(torch.randn(0, 3), items, none, (none, torch.tensor([0]))).shape == (0,)
        assert rank_of_target(torch.randn(0, 3), items, none, None).dtype == torch.int64


def test_one_item_ranks_first() -> None:
    assert rank((7.0,), 0) == 1


def test_strided_inputs_and_int32_offsets() -> None:
    queries, items = torch.randn(4, 3), torch.randn(9, 3)
    targets, values, offsets = torch.tensor([0, 8, 3, 4]), torch.tensor([1, 2, 2, 5]), torch.tensor([0, 1, 1, 3, 4])
    expected = loop(queries, items, targets, (values, offsets))

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    seen = (strided(values), strided(offsets.int()))
    assert rank_of_target(strided(queries), strided(items), strided(targets), seen).tolist() == expected


def test_is_not_differentiable() -> None:
    queries, items = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    assert not rank_of_target(queries, items, torch.tensor([0, 1]), None).requires_grad


def test_no_tensor_of_all_scores_exists() -> None:
    queries, items = torch.randn(2500, 4), torch.randn(2500, 4)
    seen = (torch.arange(2500), torch.arange(2501))
    with mock.patch.object(item_scores, "TILE", 1 << 20):
        largest = largest_allocation(lambda: rank_of_target(queries, items, torch.arange(2500), seen))
    assert largest <= 8 << 20 < 4 * 2500 * 2500 / 2


def test_opcheck() -> None:
    arguments = (torch.randn(4, 3), torch.randn(9, 3), torch.tensor([0, 8, 3, 4]))
    operator = torch.ops.xsmoe.rank_of_target
    torch.library.opcheck(operator, (*arguments, None, None, "auto"))
    torch.library.opcheck(operator, (*arguments, torch.tensor([1, 2]), torch.tensor([0, 1, 1, 2, 2]), "auto"))


def test_compiles_to_one_graph_with_unknown_sizes() -> None:
    queries, items, targets = torch.randn(4, 3), torch.randn(9, 3), torch.tensor([0, 8, 3, 4])
    seen = (torch.tensor([1, 2, 2, 5]), torch.tensor([0, 1, 1, 3, 4]))
    unbacked(queries, items, targets, *seen)
    assert compiled(rank_of_target)(queries, items, targets, seen).tolist() == loop(queries, items, targets, seen)


def test_autocast_casts_queries_and_items() -> None:
    queries, items, targets = torch.randn(4, 3).bfloat16(), torch.randn(99, 3), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        ranks = rank_of_target(queries, items, targets, None)
    assert ranks.tolist() == loop(queries, items.bfloat16(), targets, None)


def test_the_reference_ran() -> None:
    before = dispatch.calls.copy()
    with dispatch.use_backend("reference"):
        rank((1.0, 2.0), 0)
    assert dispatch.calls - before == {("rank_of_target", "reference"): 1}


VALUES, OFFSETS = torch.tensor([0, 3, 1]), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"queries": [1.0]}, TypeError, "queries must be a Tensor of shape (M, d), not list"),
        ({"queries": torch.zeros(3)}, ValueError, "queries must have shape (M, d), not (3,)"),
        ({"items": torch.zeros(4, 2)}, ValueError, "items must have shape (C, 3), not (4, 2)"),
        ({"items": torch.zeros(4, 3).double()}, TypeError, "items is torch.float64, but queries is torch.float32"),
        ({"items": torch.zeros(4, 3, device="meta")}, ValueError, "items is on meta, but queries is on cpu"),
        ({"targets": torch.tensor([0])}, ValueError, "targets must have shape (2,), not (1,)"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, "targets must be int64, not torch.float32"),
        ({"targets": torch.tensor([0, 4])}, ValueError, "targets must lie in [0, 4)"),
        ({"targets": torch.tensor([0, 1], device="meta")}, ValueError, "targets is on meta, but queries is on cpu"),
        ({"seen": VALUES}, TypeError, "seen must be None or a pair (values, offsets), not Tensor"),
        ({"seen": (VALUES,)}, TypeError, "seen must be None or a pair (values, offsets)"),
        ({"seen": (VALUES.float(), OFFSETS)}, TypeError, "seen values must be int64, not torch.float32"),
        ({"seen": (VALUES, OFFSETS[:2])}, ValueError, "seen offsets must have shape (3,), not (2,)"),
        ({"seen": (VALUES + 1, OFFSETS)}, ValueError, "seen values must lie in [0, 4)"),
        ({"seen": (VALUES, OFFSETS + 1)}, ValueError, "seen offsets must lie in [0, 4)"),
        ({"seen": (VALUES, OFFSETS.flip(0))}, ValueError, "seen offsets must ascend"),
    ],
)
def test_bad_input_is_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "queries": torch.zeros(2, 3),
        "items": torch.zeros(4, 3),
        "targets": torch.tensor([0, 1]),
        "seen": (VALUES, OFFSETS),
    }
    with pytest.raises(error, match=re.escape(message)):
        rank_of_target(**good | bad)
