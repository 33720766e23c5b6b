"""The Triton kernels of in_batch_softmax_loss with excluded items and with numbers that are not finite."""

import pytest
import torch

from tests.kernels.helpers.native_in_batch_softmax_loss import Case
from tests.kernels.helpers.triton_gpu import DEVICE, DTYPES
from tests.kernels.helpers.triton_in_batch_softmax_loss import (
    MARKS,
    draw,
    outputs,
    replaced,
    same_as_reference,
    within_budget,
)

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_of_items_that_no_query_may_draw_do_not_matter(dtype: torch.dtype, value: float) -> None:
    batch = draw(Case(40, 70, 17, 3, 0, dtype=dtype))
    hidden = torch.tensor([3, 20, 69], device=DEVICE)
    batch["counts"] = batch["counts"].clamp(min=1).index_fill(0, hidden[:2], 0)
    batch["targets"] = batch["targets"].clamp(4, 19)
    batch["rejected"] = batch["rejected"].index_fill(1, hidden.new_tensor(1), 69)
    batch = replaced(batch, items=batch["items"].detach().index_fill(0, hidden, value))
    found = same_as_reference(batch)
    assert all(result.isfinite().all() for result in found.values())
    # A logQ of -inf makes the logit of such an item +inf.
    batch["logq"] = batch["logq"].index_fill(0, hidden, -torch.inf)
    found = same_as_reference(batch)
    assert all(result.isfinite().all() for result in found.values())


@pytest.mark.parametrize("hidden", [3, 99])
def test_such_an_item_in_one_slice_only(hidden: int) -> None:
    batch = draw(Case(20, 100, 17))
    index = torch.tensor(hidden, device=DEVICE)
    batch |= {"targets": batch["targets"].clamp(4, 98), "counts": batch["counts"].index_fill(0, index, 0)}
    batch = replaced(batch, items=batch["items"].detach().index_fill(0, index, torch.nan))
    found = same_as_reference(batch)
    assert all(result.isfinite().all() for result in found.values())


def test_an_item_that_may_be_drawn_hides_no_nan() -> None:
    batch = draw(Case(40, 70, 17, counts=False))
    batch["targets"] = batch["targets"].clamp(max=68)
    batch = replaced(batch, items=batch["items"].detach().index_fill(0, torch.tensor(69, device=DEVICE), torch.nan))
    found = same_as_reference(batch)
    assert all(result.isnan().all() for result in found.values())


def test_a_query_that_is_not_finite_leaves_the_gradients_of_others_alone() -> None:
    batch = draw(Case(40, 70, 17))
    batch = replaced(batch, queries=batch["queries"].detach().index_fill(0, torch.tensor(7, device=DEVICE), torch.nan))
    found = same_as_reference(batch)
    assert found["queries"][:7].isfinite().all()
    assert found["queries"][8:].isfinite().all()


@pytest.mark.parametrize("logq", [torch.inf, -torch.inf])
def test_infinite_corrections_give_the_loss_of_the_reference(logq: float) -> None:
    batch = draw(Case(40, 70, 17, needed=(False, False)))
    batch["counts"] = batch["counts"].clamp(min=1)
    batch["logq"] = batch["logq"].index_fill(0, batch["targets"][:3], logq)
    same_as_reference(batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_without_negatives_costs_nothing(dtype: torch.dtype) -> None:
    batch = draw(Case(17, 40, 20, 0, dtype=dtype))
    everything = torch.arange(40, device=DEVICE)
    for result in outputs(batch | {"rejected": everything.expand(17, 40)}, "triton").values():
        assert (result == 0).all()
    # One query without rejected items, next to others with some.
    batch["rejected"] = torch.where(torch.arange(17, device=DEVICE)[:, None] == 4, everything, -1)
    assert (within_budget(batch)["queries"][4] == 0).all()


def test_slices_without_a_candidate() -> None:
    batch = draw(Case(5, 100, 8, counts=False))
    batch |= {"rejected": torch.arange(70, device=DEVICE).expand(5, 70), "targets": batch["targets"].clamp(min=70)}
    within_budget(batch)


def test_the_target_is_a_candidate_once_whatever_is_rejected_or_counted() -> None:
    batch = draw(Case(20, 70, 8, 2))
    expected = outputs(batch, "triton")
    target = batch["targets"][:, None]
    listed = torch.cat([batch["rejected"], target, target], dim=1)
    for name, value in outputs(batch | {"rejected": listed}, "triton").items():
        assert torch.equal(value, expected[name]), name
    everybody = batch["targets"].unique()
    one_target = batch | {"targets": everybody[:1].expand(20)}
    first, *others = (
        outputs(one_target | {"counts": batch["counts"].index_fill(0, everybody[:1], times)}, "triton")
        for times in (0, 1, 9)
    )
    for other in others:
        for name, value in other.items():
            assert torch.equal(value, first[name]), name


def test_the_same_item_rejected_several_times_is_left_out() -> None:
    batch = draw(Case(20, 70, 8, 3))
    expected = outputs(batch, "triton")
    twice = torch.cat([batch["rejected"], batch["rejected"].flip(1)], dim=1)
    for name, value in outputs(batch | {"rejected": twice}, "triton").items():
        assert torch.equal(value, expected[name]), name
