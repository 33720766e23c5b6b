"""Programs of one launch share no byte that one of them writes, and stay inside their tensors."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from tests.kernels.helpers.triton_races import OTHER_READER, OUT_OF_BOUNDS, SEVERAL_WRITERS, race_finder  # noqa: E402
from tests.kernels.helpers.triton_scenarios import launcher, side_moe_step  # noqa: E402
from xsmoe_kernels.backends.triton import interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter: TRITON_INTERPRET=1")

WEIGHTS_ONLY = (False, False, True, True, True)
ALL = (True,) * 5
MATRICES = (True, False, True, True, True)
SIDE_MOE = {
    "two levels": {"levels": 2, "needs": ALL, "sizes": (40, 80, 24, 2)},
    "one row": {"levels": 2, "needs": WEIGHTS_ONLY, "sizes": (70, 48, 16, 3), "one_row": True},
    "no frozen experts": {"levels": 2, "needs": ALL, "sizes": (40, 48, 16, 2), "apart": False},
    "recompute": {"levels": 1, "needs": MATRICES, "sizes": (70, 48, 40, 3), "recompute": True, "count": False},
}


@pytest.mark.parametrize("scenario", SIDE_MOE)
def test_side_moe(scenario: str) -> None:
    check(lambda: side_moe_step(torch.float32, **SIDE_MOE[scenario]), least=8)


def check(scenario: Callable[[], object], least: int) -> None:
    """Run a scenario, which launches at least so many kernels, and find no race."""
    torch.manual_seed(0)
    with race_finder() as races:
        scenario()
    assert races.launches.total() >= least
    assert not races.found


def test_in_batch_softmax_loss() -> None:
    def scenario() -> None:
        queries, items = torch.randn(50, 40), torch.randn(90, 40)
        items[3] = float("nan")
        counts = (torch.arange(90) != 3).float()
        users, rejected = torch.randint(0, 12, (50,)), torch.randint(-1, 90, (12, 4))
        batch = queries, items, torch.randint(0, 90, (50,)), rejected, users, torch.rand(90), counts
        loss, lse, *_ = launcher("in_batch_softmax_loss")(*batch, False, False)
        launcher("in_batch_softmax_loss_backward")(*batch, lse, None, None, loss, True, True)

    check(scenario, least=9)


def test_rank_of_target() -> None:
    queries, items, seen, offsets = ranking(40, 90)
    check(lambda: launcher("rank_of_target")(queries, items, torch.randint(0, 90, (40,)), seen, offsets), least=3)


@pytest.mark.parametrize("k", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_topk_items(k: int) -> None:
    queries, items, seen, offsets = ranking(3, 150)
    check(lambda: launcher("topk_items")(queries, items, k, seen, offsets), least=3)


def ranking(num_queries: int, num_items: int) -> tuple[torch.Tensor, ...]:
    """Return queries, items, and what each query has seen, as values and offsets."""
    seen = torch.randint(0, num_items, (3 * num_queries,))
    return torch.randn(num_queries, 40), torch.randn(num_items, 40), seen, 3 * torch.arange(num_queries + 1)


def test_grouped_mm() -> None:
    def scenario() -> None:
        x, weight, offsets = torch.randn(60, 48), torch.randn(4, 48, 40), torch.tensor([2, 10, 10, 40, 55])
        y = launcher("grouped_mm")(x, weight, offsets, 1)
        launcher("grouped_mm_backward")(y, x, weight, offsets, 1, True, True)

    check(scenario, least=3)


@pytest.mark.parametrize("renormalize", [True, False])
def test_route_topk(renormalize: bool) -> None:
    def scenario() -> None:
        logits = torch.randn(100, 7)
        gates, experts, *_ = launcher("route_topk")(logits, 2, renormalize)
        launcher("route_topk_backward")(gates, logits, experts, renormalize)

    check(scenario, least=3)


@triton.jit
def shift_kernel(source, target, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """Copy WIDTH numbers to places that start STEP after those of the program before."""
    program = tl.program_id(0)
    values = tl.load(source + program * WIDTH + tl.arange(0, WIDTH))
    tl.store(target + program * STEP + tl.arange(0, WIDTH), values)


@pytest.mark.parametrize(
    ("step", "in_place", "length", "kinds"),
    [
        (8, False, 32, set()),
        (8, True, 32, set()),
        (7, False, 32, {SEVERAL_WRITERS}),
        (9, False, 32, {OUT_OF_BOUNDS}),
        (16, True, 64, {OTHER_READER}),
    ],
)
def test_planted_races_are_found(step: int, in_place: bool, length: int, kinds: set[str]) -> None:
    # The tensors end before their memory does, so that an access outside of them harms nothing.
    source, apart = (torch.from_numpy(np.zeros(length + 64, np.float32)[:length]) for _ in range(2))
    with race_finder() as races:
        shift_kernel[(4,)](source, source if in_place else apart, STEP=step, WIDTH=8)
    assert races.launches == {"shift_kernel": 1}
    assert {kind for _, kind in races.found} == kinds
