"""Native rank_of_target and topk_items against the references where scores are exact; as a program, all cases.

Scores of small integers do not depend on the order of their sums, so that nothing but equality will do, and many of
them are equal. The program prints the tier that ran and how many cases agreed.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from xsmoe_kernels import dispatch, rank_of_target, topk_items, use_backend

Result = TypeVar("Result")

DTYPES = (torch.float32, torch.bfloat16)
# Around the panels and tiles of all tiers, and inner dimensions around those that are summed in one go.
SIZES = ((0, 5, 3), (1, 1, 1), (1, 700, 5), (3, 9, 2), (15, 33, 31), (33, 1100, 33), (47, 513, 64), (9, 520, 600))
PLACES = (1, 10, 300, 1200)


class Case(NamedTuple):
    queries: Tensor
    items: Tensor
    targets: Tensor
    seen: tuple[Tensor, Tensor] | None


def make_case(
    num_queries: int, num_items: int, dim: int, dtype: torch.dtype, *, seed: int = 0, most_seen: int | None = None
) -> Case:
    """Integer-valued queries and items. With `most_seen` lists of up to so many items each, in no order, with
    repetitions; every other one names its target as well."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    queries, items = integers(-2, 3, num_queries, dim).to(dtype), integers(-2, 3, num_items, dim).to(dtype)
    targets = integers(0, num_items, num_queries)
    if most_seen is None:
        return Case(queries, items, targets, None)
    lists = [integers(0, num_items, int(integers(0, most_seen + 1, 1))) for _ in range(num_queries)]
    lists = [torch.cat((one, targets[m : m + 1])) if m % 2 else one for m, one in enumerate(lists)]
    return Case(queries, items, targets, ragged(lists))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases of any size, around a block of queries and several tiles of items."""
    sizes = draw(st.integers(0, 40)), draw(st.integers(1, 600)), draw(st.integers(1, 300))
    dtype, most_seen = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([None, 0, 5, 400]))
    return make_case(*sizes, dtype, seed=draw(st.integers(0, 2**31)), most_seen=most_seen)


def ragged(lists: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Lists as values and offsets."""
    lengths = torch.tensor([0, *map(len, lists)])
    return torch.cat([torch.empty(0, dtype=torch.int64), *lists]), lengths.cumsum(0)


def native_rank(case: Case) -> Tensor:
    """The native kernel's ranks; fails if another backend served."""
    return _native("rank_of_target", lambda: rank_of_target(*case))


def native_topk(case: Case, k: int) -> tuple[Tensor, Tensor]:
    """The native kernel's scores and ids; fails if another backend served."""
    return _native("topk_items", lambda: topk_items(case.queries, case.items, k, case.seen))


def check_rank(case: Case) -> None:
    """Fails unless the native ranks are the reference's."""
    with use_backend("reference"):
        expected = rank_of_target(*case)
    assert torch.equal(native_rank(case), expected)


def check_topk(case: Case, k: int) -> None:
    """Fails unless the native scores and ids are the reference's."""
    with use_backend("reference"):
        expected = topk_items(case.queries, case.items, k, case.seen)
    scores, ids = native_topk(case, k)
    assert scores.dtype == torch.float32
    assert torch.equal(ids, expected[1])
    assert torch.equal(scores, expected[0])


def check_equals_tie(num_queries: int, num_items: int, dim: int, dtype: torch.dtype) -> None:
    """Copies of one item score the same to the bit, in whichever column and block they stand."""
    generator = torch.Generator().manual_seed(dim)
    items = torch.randn(1, dim, generator=generator).to(dtype).repeat(num_items, 1)
    queries = torch.randn(num_queries, dim, generator=generator).to(dtype)
    middle = 1 + num_items // 2
    for first in (0, num_items - num_queries):
        targets = torch.arange(first, first + num_queries) % num_items
        assert native_rank(Case(queries, items, targets, None)).tolist() == [middle] * num_queries
    scores, ids = native_topk(Case(queries, items, targets, None), num_items)
    assert (scores == scores[:, :1]).all()
    assert ids.tolist() == [list(range(num_items))] * num_queries


def _native(operator: str, run: Callable[[], Result]) -> Result:
    before = dispatch.calls.copy()
    with use_backend("native"):
        result = run()
    assert dispatch.calls - before == {(operator, "native"): 1}
    return result


def main() -> None:
    # Fills `torch.empty` with NaN, as pytest does for the tests.
    torch.use_deterministic_algorithms(True, warn_only=True)
    agreed = 0
    for dtype in DTYPES:
        for seed, size in enumerate(SIZES):
            for most_seen in (None, 9, 2 * size[1]):
                case = make_case(*size, dtype, seed=seed, most_seen=most_seen)
                check_rank(case)
                for k in PLACES:
                    check_topk(case, k)
                agreed += 1
        for dim in (1, 33, 300):
            check_equals_tie(35, 549, dim, dtype)
            agreed += 1
    print(torch.ops.xsmoe_native.cpu_tier(), agreed)


NUM_CASES = len(DTYPES) * (3 * len(SIZES) + 3)

if __name__ == "__main__":
    main()
