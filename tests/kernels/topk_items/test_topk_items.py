"""topk_items against a loop over items."""

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
from tests.kernels.helpers.error_budget import assert_within_budget
from xsmoe_kernels.ops.scoring import item_scores
from xsmoe_kernels.ops.topk_items import topk_items
from xsmoe_kernels.runtime import dispatch

Seen = tuple[Tensor, Tensor] | None


def loop(queries: Tensor, items: Tensor, k: int, seen: Seen) -> tuple[list[list[float]], list[list[int]]]:
    """Compute scores and ids item by item, in Python floats."""
    all_scores, all_ids = [], []
    for m, query in enumerate(queries.tolist()):
        left_out = set() if seen is None else set(seen[0][int(seen[1][m]) : int(seen[1][m + 1])].tolist())
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in items.tolist()]
        eligible = [i for i, s in enumerate(scores) if i not in left_out and not math.isnan(s) and s != -math.inf]
        ids = sorted(eligible, key=lambda i, scores=scores: (-scores[i], i))[:k]
        missing = k - len(ids)
        all_scores.append([scores[i] for i in ids] + [-math.inf] * missing)
        all_ids.append(ids + [-1] * missing)
    return all_scores, all_ids


def best(scores: tuple[float, ...], k: int, seen: list[int] | None = None) -> tuple[list[float], list[int]]:
    """Return the results for one query and items with these scores for it."""
    ragged = None if seen is None else (torch.tensor(seen, dtype=torch.int64), torch.tensor([0, len(seen)]))
    values, ids = topk_items(torch.ones(1, 1), torch.tensor(scores)[:, None], k, ragged)
    return values[0].tolist(), ids[0].tolist()


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, Seen]:
    num_queries, num_items, dim = draw(st.integers(0, 8)), draw(st.integers(0, 12)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    # Small integers: the scores are exact, and many of them are equal.
    queries, items = integers(-2, 3, num_queries, dim).float(), integers(-2, 3, num_items, dim).float()
    k = draw(st.integers(1, 15))
    if num_items == 0 or not draw(st.booleans()):
        return queries, items, k, None
    # The first and the last values belong to nobody.
    bounds = integers(0, 5, num_queries + 2).cumsum(0)
    return queries, items, k, (integers(0, num_items, int(bounds[-1])), bounds[:-1])


@settings(deadline=None, derandomize=True, max_examples=80)
@given(case=catalogues(), tile=st.sampled_from([1, 30, 1 << 21]))
def test_equals_a_loop_over_items(case: tuple[Tensor, Tensor, int, Seen], tile: int) -> None:
    with mock.patch.object(item_scores, "TILE", tile):
        scores, ids = topk_items(*case)
    expected_scores, expected_ids = loop(*case)
    assert ids.tolist() == expected_ids
    assert scores.tolist() == expected_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_error_budget(dtype: torch.dtype) -> None:
    queries, items = torch.randn(20, 48).to(dtype), torch.randn(60, 48).to(dtype)
    scores, ids = topk_items(queries, items, 7, None)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plain = (queries @ items.T).gather(1, ids).to(scores.dtype)
    exact = queries.double() @ items.double().T
    assert_within_budget(scores, plain, exact.gather(1, ids), "scores")
    assert ids.tolist() == exact.topk(7).indices.tolist()


def test_ties_go_to_the_lower_id_and_at_the_last_place_too() -> None:
    assert best((1.0, 3.0, 1.0, 3.0, 1.0, 2.0), 4) == ([3.0, 3.0, 2.0, 1.0], [1, 3, 5, 0])
    assert best((0.0, -0.0, 0.0), 2) == ([0.0, 0.0], [0, 1])
    assert best((1.0,) * 9, 9)[1] == list(range(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tile", "num_queries", "num_items"), [(1 << 21, 1, 13), (26, 5, 13), (1, 3, 21)])
def test_equal_items_tie_where_a_tile_has_one_row(
    dtype: torch.dtype, tile: int, num_queries: int, num_items: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    for dim in (3, 33, 512):
        items = torch.randn(1, dim, generator=generator).to(dtype).expand(num_items, dim)
        queries = torch.randn(num_queries, dim, generator=generator).to(dtype)
        with mock.patch.object(item_scores, "TILE", tile):
            scores, ids = topk_items(queries, items.contiguous(), num_items, None)
        assert ids.tolist() == [list(range(num_items))] * num_queries
        assert (scores == scores[:, :1]).all()


def test_a_seen_item_is_never_returned() -> None:
    assert best((5.0, 4.0, 3.0), 2, [0, 0]) == ([4.0, 3.0], [1, 2])
    assert best((5.0, 4.0, 3.0), 2, [0, 2]) == ([4.0, -math.inf], [1, -1])
    assert best((5.0, 4.0, 3.0), 2, [0, 1, 2]) == ([-math.inf] * 2, [-1] * 2)


def test_places_beyond_the_catalogue_are_missing() -> None:
    assert best((1.0, 2.0), 4) == ([2.0, 1.0, -math.inf, -math.inf], [1, 0, -1, -1])


def test_scores_that_are_not_finite() -> None:
    scores = (1.0, math.nan, math.inf, -math.inf, 2.0)
    assert best(scores, 5) == ([math.inf, 2.0, 1.0, -math.inf, -math.inf], [2, 4, 0, -1, -1])


def test_no_queries_and_no_items() -> None:
    for num_queries, num_items in ((0, 5), (3, 0), (0, 0)):
        offsets = torch.zeros(num_queries + 1, dtype=torch.int64)
        seen = (torch.empty(0, dtype=torch.int64), offsets)
        scores, ids = topk_items(torch.randn(num_queries, 3), torch.randn(num_items, 3), 2, seen)
        assert scores.shape == ids.shape == (num_queries, 2)
        assert (ids == -1).all() or num_items > 0


def test_strided_inputs_and_int32_offsets() -> None:
    queries, items = torch.randn(4, 3).T.contiguous().T, torch.randn(18, 3)[::2]
    values, offsets = torch.tensor([1, 2, 2, 5]), torch.tensor([0, 1, 1, 3, 4])
    strided = (torch.stack([values, values], 1)[:, 0], torch.stack([offsets, offsets], 1)[:, 0].int())
    assert topk_items(queries, items, 5, strided)[1].tolist() == loop(queries, items, 5, (values, offsets))[1]


def test_is_not_differentiable() -> None:
    scores, _ = topk_items(torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True), 2, None)
    assert not scores.requires_grad


def test_no_tensor_of_all_scores_exists() -> None:
    queries, items = torch.randn(2500, 4), torch.randn(2500, 4)
    seen = (torch.arange(2500), torch.arange(2501))
    with mock.patch.object(item_scores, "TILE", 1 << 20):
        largest = largest_allocation(lambda: topk_items(queries, items, 5, seen))
    assert largest <= 8 << 20 < 4 * 2500 * 2500 / 2


def test_opcheck() -> None:
    queries, items = torch.randn(4, 3), torch.randn(9, 3)
    operator = torch.ops.xsmoe.topk_items
    torch.library.opcheck(operator, (queries, items, 3, None, None, "auto"))
    torch.library.opcheck(operator, (queries, items, 12, torch.tensor([1, 2]), torch.tensor([0, 1, 1, 2, 2]), "auto"))


def test_compiles_to_one_graph_with_unknown_sizes() -> None:
    queries, items = torch.randn(4, 3), torch.randn(9, 3)
    seen = (torch.tensor([1, 2, 2, 5]), torch.tensor([0, 1, 1, 3, 4]))
    expected = topk_items(queries, items, 12, seen)
    unbacked(queries, items, *seen)
    torch.testing.assert_close(compiled(topk_items)(queries, items, 12, seen), expected)


def test_autocast_casts_queries_and_items() -> None:
    queries, items = torch.randn(4, 3).bfloat16(), torch.randn(30, 3)
    with torch.autocast("cpu", torch.bfloat16):
        actual = topk_items(queries, items, 5, None)
    torch.testing.assert_close(actual, topk_items(queries, items.bfloat16(), 5, None), rtol=0, atol=0)


def test_the_reference_ran() -> None:
    before = dispatch.calls.copy()
    with dispatch.use_backend("reference"):
        best((1.0, 2.0), 1)
    assert dispatch.calls - before == {("topk_items", "reference"): 1}


VALUES, OFFSETS = torch.tensor([0, 3, 1]), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"queries": [1.0]}, TypeError, "queries must be a Tensor of shape (M, d), not list"),
        ({"queries": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "queries must be float32"),
        ({"items": torch.zeros(4, 2)}, ValueError, "items must have shape (C, 3), not (4, 2)"),
        ({"items": torch.zeros(4, 3).double()}, TypeError, "items is torch.float64, but queries is torch.float32"),
        ({"items": torch.zeros(4, 3, device="meta")}, ValueError, "items is on meta, but queries is on cpu"),
        ({"k": 0}, ValueError, "k must be at least 1, not 0"),
        ({"k": 2.0}, TypeError, "k must be an int, not float"),
        ({"k": True}, TypeError, "k must be an int, not bool"),
        ({"seen": {}}, TypeError, "seen must be None or a pair (values, offsets), not dict"),
        ({"seen": (VALUES.int(), OFFSETS)}, TypeError, "seen values must be int64, not torch.int32"),
        ({"seen": (VALUES, OFFSETS[:2])}, ValueError, "seen offsets must have shape (3,), not (2,)"),
        ({"seen": (VALUES + 1, OFFSETS)}, ValueError, "seen values must lie in [0, 4)"),
        ({"seen": (VALUES - 1, OFFSETS)}, ValueError, "seen values must lie in [0, 4)"),
        ({"seen": (VALUES, OFFSETS.flip(0))}, ValueError, "seen offsets must ascend"),
    ],
)
def test_bad_input_is_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"queries": torch.zeros(2, 3), "items": torch.zeros(4, 3), "k": 2, "seen": (VALUES, OFFSETS)}
    with pytest.raises(error, match=re.escape(message)):
        topk_items(**good | bad)
