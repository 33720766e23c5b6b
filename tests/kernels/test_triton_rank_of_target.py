"""The Triton kernels of rank_of_target against the reference: in Triton's interpreter, or on a GPU if there is one."""

import math

import pytest
import torch
from compilation import compiled
from hypothesis import given, settings
from native_ranking import Case, make_case, ragged
from triton_gpu import DEVICE, DTYPES, ON_GPU, leave_memory_alone, needs_gpu, needs_triton, reverse_programs, spread
from triton_ranking import captured, cases, check_rank, on_device, random_case, triton_rank

from xsmoe_kernels import dispatch, rank_of_target, scoring_triton
from xsmoe_kernels.rank_of_target import triton_kernels

pytestmark = [
    needs_triton,
    # NumPy's, of the interpreter: products of infinity and zero.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@settings(deadline=None, derandomize=True, max_examples=400 if ON_GPU else 30)
@given(case=cases())
def test_equals_the_reference(case: Case) -> None:
    check_rank(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 32, 33, *((64, 128, 257, 768) if ON_GPU else ())])
def test_copies_of_one_item_tie_wherever_they_stand(dtype: torch.dtype, dim: int) -> None:
    """To the bit, also with the target's own score, which is computed apart from theirs."""
    generator = torch.Generator().manual_seed(dim)
    for num_queries, num_items in ((1, 1), (3, 97), (17, 131), *(((300, 3001),) if ON_GPU else ())):
        item = torch.randn(1, dim, generator=generator).to(dtype)
        queries = torch.randn(num_queries, dim, generator=generator).to(dtype)
        middle = 1 + num_items // 2
        for first in (0, num_items - 1):
            targets = (first + 7 * torch.arange(num_queries)) % num_items
            case = on_device(Case(queries, item.repeat(num_items, 1), targets, None))
            assert triton_rank(case).tolist() == [middle] * num_queries


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_within_the_rounding_of_scores(dtype: torch.dtype) -> None:
    num_items = 9000 if ON_GPU else 300
    case = random_case(20, num_items, 40, dtype, most_seen=None)
    scores = case.queries.double() @ case.items.double().T
    own = scores.gather(1, case.targets[:, None])
    slack = 4 * torch.finfo(torch.float32).eps * 40
    ranks = triton_rank(case)
    assert (ranks > (scores > own + slack).sum(1)).all()
    # Its copy takes half a place, rounded up.
    assert (ranks <= (scores > own - slack).sum(1)).all()


def rank(scores: tuple[float, ...], target: int, seen: tuple[int, ...] = ()) -> int:
    """Of one query of a block of three, behind 40 items that each of them has seen."""
    items = torch.tensor([*[9.0] * 40, *scores])[:, None]
    left_out = torch.tensor([40 + place for place in seen] + list(range(40)), dtype=torch.int64)
    ranks = check_rank(Case(torch.ones(3, 1), items, torch.full((3,), 40 + target), ragged([left_out] * 3)))
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_items_and_queries_with_infinities_among_them(dtype: torch.dtype) -> None:
    case = make_case(20, 140, 40, dtype, most_seen=20)
    case.items[::7, 3] = math.inf
    case.items[5::11, 38] = -math.inf
    case.queries[4, 7] = math.nan
    case.queries[5, 8] = math.inf
    check_rank(case)


def test_every_item_seen_and_one_item_alone() -> None:
    case = make_case(17, 130, 5, torch.float32)
    everything = torch.arange(130).flip(0)
    assert check_rank(case._replace(seen=ragged([everything] * 17))).tolist() == [1] * 17
    assert check_rank(make_case(40, 1, 7, torch.float32)).tolist() == [1] * 40


def test_no_queries() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for num_items in (0, 5):
        case = Case(torch.ones(0, 3), torch.ones(num_items, 3), none, (none, torch.tensor([0])))
        assert check_rank(case).shape == (0,)
        assert check_rank(case._replace(seen=None)).dtype == torch.int64


def test_rows_of_no_numbers() -> None:
    assert check_rank(make_case(3, 40, 0, torch.float32)).tolist() == [21] * 3


@pytest.mark.parametrize("programs", [1, 4, 9, 1000])
def test_any_number_of_slices(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(20, 330, 33, torch.float32)
    expected = triton_rank(case)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", programs)
    monkeypatch.setattr(triton_kernels, "FEWEST_TILES", 1)
    assert torch.equal(triton_rank(case), expected)


def test_wide_keys_of_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_triton, "NARROW", 0)
    case = make_case(18, 70, 3, torch.float32, most_seen=30)
    assert case.seen is not None
    values, offsets = case.seen
    check_rank(case)
    check_rank(case._replace(seen=(torch.cat((values, values, values)), offsets + len(values))))


def test_gives_the_same_bits_twice() -> None:
    case = random_case(20, 150, 48, torch.float32)
    assert torch.equal(triton_rank(case), triton_rank(case))


def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(20, 150, 48, torch.float32)
    expected = triton_rank(case)
    reverse_programs(monkeypatch)
    assert torch.equal(triton_rank(case), expected)


def test_autocast() -> None:
    case = random_case(5, 70, 17, torch.float32)
    narrow = case._replace(queries=case.queries.bfloat16(), items=case.items.bfloat16())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(triton_rank(case), triton_rank(narrow))


def test_places_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(18, 40, 16, torch.float16, most_seen=9)
    expected = check_rank(case)
    case = on_device(case)
    leave_memory_alone(monkeypatch)
    far = case._replace(queries=spread(case.queries, (2**31 // 14, 1)), items=spread(case.items, (2**31 // 30, 1)))
    assert torch.equal(triton_rank(far), expected)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_waits_for_nothing_and_is_captured_by_a_graph(dtype: torch.dtype) -> None:
    case = random_case(500, 20_000, 128, dtype)
    assert case.seen is not None
    graph, ranks = captured(lambda: triton_rank(case))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        case.targets.copy_(torch.randint(0, 20_000, (500,), generator=generator))
        case.seen[0].copy_(torch.randint(0, 20_000, (len(case.seen[0]),), generator=generator))
        case.seen[1][1:-1] = case.seen[1][1:-1] // 2
        graph.replay()
        assert torch.equal(ranks, triton_rank(case))


@needs_gpu
def test_compiles_whole() -> None:
    case = random_case(300, 5000, 64, torch.float32)
    before = dispatch.calls.copy()
    ranks = compiled(rank_of_target, backend="inductor")(*case)
    assert set(dispatch.calls - before) == {("rank_of_target", "triton")}
    assert torch.equal(ranks, triton_rank(case))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries, num_items, dim", [(1, 300_000, 128), (2000, 100_000, 128), (300, 50_000, 100)])
def test_large_sizes(num_queries: int, num_items: int, dim: int, dtype: torch.dtype) -> None:
    # Exact in float32, whatever the order: a score is a sum of `dim` numbers of at most 4.
    check_rank(make_case(num_queries, num_items, dim, dtype, most_seen=300))
    # Ranks of copies, which sums of other orders would tell apart.
    case = random_case(num_queries, 3, dim, dtype, most_seen=None)
    copies = case.items[:1].expand(num_items, dim).contiguous()
    targets = torch.randint(0, num_items, (num_queries,), device=DEVICE)
    ranks = triton_rank(Case(case.queries, copies, targets, None))
    assert (ranks == 1 + num_items // 2).all()
