"""Tests of rank_of_target for every backend, which subclasses run."""

import math
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.ranking import Case, Served, captured, make_case, on, ragged
from tests.kernels.helpers.triton_gpu import ON_GPU, needs_gpu, spread
from xsmoe_kernels import rank_of_target, use_backend
from xsmoe_kernels.runtime import dispatch


class RankChecks:
    """Ranks of a backend.

    Attributes:
        served: the backend and its device.
        dtypes: the supported ones.
        tie_dims, tie_sizes: inner dimensions, and numbers of queries and items, of which all items are one.
        rounded: queries, items and inner dimension of scores that are rounded.
        wide: items of several tiles.
        before: the number of items in front of those that a test names, several tiles.
    """

    served: ClassVar[Served]
    dtypes: ClassVar[Sequence[torch.dtype]]
    tie_dims: ClassVar[Sequence[int]]
    tie_sizes: ClassVar[Sequence[tuple[int, int]]]
    rounded: ClassVar[tuple[int, int, int]]
    wide: ClassVar[int]
    before: ClassVar[int]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize tests of a dtype, or of an inner dimension of ties, by the subclass's attributes."""
        for argument, values in (("dtype", self.dtypes), ("tie_dim", self.tie_dims)):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values)

    def few(self, scores: tuple[float, ...], target: int, seen: tuple[int, ...] = ()) -> int:
        """Return the rank of a target of a query in a block of three, after items that all of them have seen."""
        items = torch.tensor([*[9.0] * self.before, *scores])[:, None]
        left_out = torch.tensor([self.before + place for place in seen] + list(range(self.before)), dtype=torch.int64)
        targets = torch.full((3,), self.before + target)
        ranks = self.served.check_rank(Case(torch.ones(3, 1), items, targets, ragged([left_out] * 3)))
        assert (ranks == ranks[0]).all()
        return int(ranks[0])

    def test_copies_of_one_item_tie_at_every_position(self, dtype: torch.dtype, tie_dim: int) -> None:
        """Scores are bitwise equal, also to the target's own score, which may be computed separately."""
        for num_queries, num_items in self.tie_sizes:
            self.served.check_copies_tie(num_queries, num_items, tie_dim, dtype)

    def test_is_within_the_rounding_of_scores(self, dtype: torch.dtype) -> None:
        case = self.served.random_case(*self.rounded, dtype, most_seen=None)
        scores = case.queries.double() @ case.items.double().T
        own = scores.gather(1, case.targets[:, None])
        slack = 4 * torch.finfo(torch.float32).eps * case.queries.shape[1]
        ranks = self.served.rank(case)
        assert (ranks > (scores > own + slack).sum(1)).all()
        # Its copy adds half a rank, rounded up.
        assert (ranks <= (scores > own - slack).sum(1)).all()

    def test_ties_and_seen_items(self) -> None:
        scores = (5.0, 4.0, 4.0, 4.0, 2.0)
        assert self.few(scores, 1) == 1 + 1 + 1
        assert self.few(scores, 1, (2,)) == 1 + 1 + 1
        assert self.few(scores, 1, (2, 3)) == 1 + 1
        assert self.few(scores, 1, (0, 0, 0, 3, 3, 2)) == 1, "listed thrice, left out once"
        assert self.few(scores, 1, (1, 0)) == 1 + 1, "ranked although it was seen"
        assert self.few(scores, 4, (0, 1, 2, 3, 4)) == 1
        assert self.few((0.0, -0.0, 0.0), 1) == 2

    @pytest.mark.parametrize("own", [math.nan, math.inf, -math.inf])
    def test_scores_that_are_not_finite(self, own: float) -> None:
        assert self.few((own, 1.0, 2.0, 3.0), 0) == 4
        assert self.few((own, 1.0, math.nan, 3.0), 0, (0, 1)) == 3
        assert self.few((own, own, own), 0, (1, 1)) == 2
        assert self.few((1.0, own, own), 0) == (3 if own == math.inf else 1)

    def test_items_and_queries_with_infinities_among_them(self, dtype: torch.dtype) -> None:
        case = make_case(20, self.wide, 40, dtype, most_seen=20)
        case.items[::7, 3] = math.inf
        case.items[5::11, 38] = -math.inf
        case.queries[4, 7] = math.nan
        case.queries[5, 8] = math.inf
        self.served.check_rank(case)

    def test_every_item_seen_and_one_item_alone(self) -> None:
        case = make_case(17, self.wide, 5, torch.float32)
        everything = torch.arange(self.wide).flip(0)
        assert self.served.check_rank(case._replace(seen=ragged([everything] * 17))).tolist() == [1] * 17
        assert self.served.check_rank(make_case(40, 1, 7, torch.float32)).tolist() == [1] * 40

    def test_no_queries(self) -> None:
        none = torch.empty(0, dtype=torch.int64)
        for num_items in (0, 5):
            case = Case(torch.ones(0, 3), torch.ones(num_items, 3), none, (none, torch.tensor([0])))
            assert self.served.check_rank(case).shape == (0,)
            assert self.served.check_rank(case._replace(seen=None)).dtype == torch.int64

    def test_rows_of_no_numbers(self) -> None:
        assert self.served.check_rank(make_case(3, 40, 0, torch.float32)).tolist() == [21] * 3

    def test_is_deterministic(self) -> None:
        case = self.served.random_case(20, 150, 48, torch.float32)
        assert torch.equal(self.served.rank(case), self.served.rank(case))


class GpuRankChecks(RankChecks):
    """Ranks of GPU kernels."""

    far_dtype: ClassVar[torch.dtype]

    def test_places_beyond_32_bits(self) -> None:
        case = make_case(18, 40, 16, self.far_dtype, most_seen=9)
        expected = self.served.check_rank(case)
        case = on(self.served.device, case)
        far = case._replace(queries=spread(case.queries, (2**31 // 14, 1)))
        assert torch.equal(self.served.rank(far), expected)
        del far  # it has gigabytes
        far = case._replace(items=spread(case.items, (2**31 // 30, 1)))
        assert torch.equal(self.served.rank(far), expected)

    @needs_gpu
    def test_waits_for_nothing_and_is_captured_by_a_graph(self, dtype: torch.dtype) -> None:
        case = self.served.random_case(500, 20_000, 128, dtype)
        assert case.seen is not None
        graph, ranks = captured(lambda: self.served.rank(case))
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            case.targets.copy_(torch.randint(0, 20_000, (500,), generator=generator))
            case.seen[0].copy_(torch.randint(0, 20_000, (len(case.seen[0]),), generator=generator))
            case.seen[1][1:-1] = case.seen[1][1:-1] // 2
            graph.replay()
            assert torch.equal(ranks, self.served.rank(case))

    @needs_gpu
    def test_compiles_whole(self) -> None:
        case = self.served.random_case(300, 5000, 64, torch.float32)
        before = dispatch.calls.copy()
        with use_backend(self.served.backend):
            ranks = compiled(rank_of_target, backend="inductor")(*case)
        assert set(dispatch.calls - before) == {("rank_of_target", self.served.backend)}
        assert torch.equal(ranks, self.served.rank(case))

    @needs_gpu
    @pytest.mark.parametrize(
        "num_queries, num_items, dim", [(1, 300_000, 128), (2000, 100_000, 128), (300, 50_000, 100)]
    )
    def test_large_sizes(self, num_queries: int, num_items: int, dim: int, dtype: torch.dtype) -> None:
        # Exact in float32, whatever the order: a score is a sum of `dim` numbers of at most 4.
        self.served.check_rank(make_case(num_queries, num_items, dim, dtype, most_seen=300))
        # Ranks of copies, which would differ with another order of summation.
        case = self.served.random_case(num_queries, 3, dim, dtype, most_seen=None)
        copies = case.items[:1].expand(num_items, dim).contiguous()
        targets = torch.randint(0, num_items, (num_queries,), device=self.served.device)
        ranks = self.served.rank(Case(case.queries, copies, targets, None))
        assert (ranks == 1 + num_items // 2).all()


def sizes(always: Sequence[int], on_gpu: Sequence[int]) -> list[int]:
    """Return the cases; more on a GPU than in an emulation."""
    return [*always, *(on_gpu if ON_GPU else ())]
