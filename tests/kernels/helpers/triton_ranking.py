"""Helpers for tests of the Triton kernels of rank_of_target and topk_items."""

from hypothesis import strategies as st

from tests.kernels.helpers import ranking
from tests.kernels.helpers.ranking import Case, Served
from tests.kernels.helpers.triton_gpu import DEVICE, DTYPES, ON_GPU

TRITON = Served("triton", DEVICE)


def cases() -> st.SearchStrategy[Case]:
    """Return sizes around blocks of queries, tiles of items and steps of width."""
    return ranking.cases(
        num_queries=[0, 1, 2, 15, 16, 17, 33, *((64, 65, 129, 300) if ON_GPU else ())],
        num_items=[1, 2, 31, 32, 33, 64, 90, 140, *((127, 129, 1000, 9000) if ON_GPU else ())],
        dim=[1, 2, 15, 16, 17, 32, 33, 48, *((64, 100, 128, 256, 300, 768) if ON_GPU else ())],
        most_seen=[None, 0, 3, 40, *((2000,) if ON_GPU else ())],
        dtypes=DTYPES,
        device=DEVICE,
    )
