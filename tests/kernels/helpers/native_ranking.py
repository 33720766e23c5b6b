"""Native rank_of_target and topk_items against the references; as a program, all cases on one instruction set.

The program prints the instruction set and the number of cases that agreed.
"""

import torch
from hypothesis import strategies as st

from tests.kernels.helpers.ranking import Case, Served, make_case

NATIVE = Served("native", torch.device("cpu"))
DTYPES = (torch.float32, torch.bfloat16)
# Around the panels and tiles of all instruction set levels.
# Also inner dimensions around those that are summed in one go.
SIZES = ((0, 5, 3), (1, 1, 1), (1, 700, 5), (3, 9, 2), (15, 33, 31), (33, 1100, 33), (47, 513, 64), (9, 520, 600))
PLACES = (1, 10, 300, 1200)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Return cases of sizes around a block of queries and several tiles of items."""
    sizes = draw(st.integers(0, 40)), draw(st.integers(1, 600)), draw(st.integers(1, 300))
    dtype, most_seen = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([None, 0, 5, 400]))
    return make_case(*sizes, dtype, seed=draw(st.integers(0, 2**31)), most_seen=most_seen)


def check_equals_tie(num_queries: int, num_items: int, dim: int, dtype: torch.dtype) -> None:
    """Copies of one item rank equally and are returned in order, in every column and block."""
    NATIVE.check_copies_tie(num_queries, num_items, dim, dtype)
    generator = torch.Generator().manual_seed(dim)
    items = torch.randn(1, dim, generator=generator).to(dtype).repeat(num_items, 1)
    queries = torch.randn(num_queries, dim, generator=generator).to(dtype)
    scores, ids = NATIVE.topk(Case(queries, items, torch.zeros(num_queries, dtype=torch.int64), None), num_items)
    assert (scores == scores[:, :1]).all()
    assert ids.tolist() == [list(range(num_items))] * num_queries


def main() -> None:
    # Fills `torch.empty` with NaN, as pytest does for the tests.
    torch.use_deterministic_algorithms(True, warn_only=True)
    agreed = 0
    for dtype in DTYPES:
        for seed, size in enumerate(SIZES):
            for most_seen in (None, 9, 2 * size[1]):
                case = make_case(*size, dtype, seed=seed, most_seen=most_seen)
                NATIVE.check_rank(case)
                for k in PLACES:
                    NATIVE.check_topk(case, k)
                agreed += 1
        for dim in (1, 33, 300):
            check_equals_tie(35, 549, dim, dtype)
            agreed += 1
    print(torch.ops.xsmoe_native.cpu_tier(), agreed)


NUM_CASES = len(DTYPES) * (3 * len(SIZES) + 3)

if __name__ == "__main__":
    main()
