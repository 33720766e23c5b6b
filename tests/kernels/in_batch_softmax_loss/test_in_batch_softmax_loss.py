"""in_batch_softmax_loss against a loop over rows, its gradients, and the estimate by its correction."""

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
from xsmoe_kernels.ops.in_batch_softmax_loss import in_batch_softmax_loss, reference
from xsmoe_kernels.runtime import dispatch


def loop(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    rejected: Tensor,
    users: Tensor | None = None,
    logq: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Compute the loss row by row and item by item, in the inputs' dtype; differentiable."""
    total = 0 * (queries.sum() + items.sum())
    for m in range(len(queries)):
        target = int(targets[m])
        left_out = {target, *rejected[m if users is None else users[m]].tolist()}
        terms = []
        for i in [target, *(i for i in range(len(items)) if i not in left_out)]:
            logit = queries[m] @ items[i]
            if logq is not None:
                logit = logit - logq[i].to(logit.dtype)
            times = 1 if counts is None or i == target else counts[i].to(logit.dtype)
            terms.append((logit, times))
        largest = max(float(logit.detach()) for logit, _ in terms)
        total = total + largest + sum(times * (logit - largest).exp() for logit, times in terms).log() - terms[0][0]
    return total / max(1, len(queries))


Batch = dict[str, Any]


def make(
    num_queries: int,
    num_items: int,
    dim: int,
    width: int,
    *,
    seed: int = 0,
    by_user: bool = True,
    logq: bool = True,
    counts: bool = True,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    num_rows = 3 if by_user else num_queries
    return {
        "queries": rows(num_queries, dim).requires_grad_(),
        "items": rows(num_items, dim).requires_grad_(),
        "targets": draw(0, num_items, num_queries),
        "rejected": draw(-1, num_items, num_rows, width),
        "users": draw(0, num_rows, num_queries) if by_user else None,
        "logq": rows(num_items).softmax(0).log() if logq else None,
        "counts": draw(0, 4, num_items) if counts else None,
    }


def rounded(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return the batch with queries and items in `dtype`, as leaves."""
    return batch | {name: batch[name].detach().to(dtype).requires_grad_() for name in ("queries", "items")}


def outputs(function: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and the gradients of queries and items for an upstream gradient that is not 1."""
    loss = function(**batch)
    return loss, *torch.autograd.grad(3 * loss, (batch["queries"], batch["items"]))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.integers(0, 7),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 6),
    st.integers(0, 1000),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 20, 1 << 18]),
)
def test_equals_a_loop_over_rows(
    num_queries: int,
    num_items: int,
    dim: int,
    width: int,
    seed: int,
    by_user: bool,
    logq: bool,
    counts: bool,
    tile: int,
) -> None:
    batch = make(num_queries, num_items, dim, width, seed=seed, by_user=by_user, logq=logq, counts=counts)
    with mock.patch.object(reference, "TILE", tile):
        actual = outputs(in_batch_softmax_loss, batch)
    torch.testing.assert_close(actual, outputs(loop, batch))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_gradcheck_of_every_subset(needs: tuple[bool, bool]) -> None:
    batch = make(5, 6, 3, 2)
    for name, need in zip(("queries", "items"), needs, strict=True):
        batch[name].requires_grad_(need)

    def loss(queries: Tensor, items: Tensor) -> Tensor:
        return in_batch_softmax_loss(**batch | {"queries": queries, "items": items})

    assert torch.autograd.gradcheck(loss, (batch["queries"], batch["items"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget(dtype: torch.dtype) -> None:
    batch = rounded(make(40, 50, 16, 4), dtype)
    actual, plain, exact = (
        outputs(in_batch_softmax_loss, batch),
        outputs(loop, batch),
        outputs(loop, rounded(batch, torch.float64)),
    )
    assert [t.dtype for t in actual] == [torch.float32, dtype, dtype]
    for name, *values in zip(("queries", "items"), actual[1:], plain[1:], exact[1:], strict=True):
        assert_within_budget(*values, f"gradient of {name}")
    assert_within_budget(actual[0], plain[0].float(), exact[0], "loss")


def test_subtracting_logq_estimates_the_full_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    num_items, draws = 60, 4000
    items = torch.randn(num_items, 8, generator=generator, dtype=torch.float64)
    query = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    # Popular items score high, so that a wrong correction cannot average out.
    probability = (query @ items.T)[0].softmax(0)
    target = torch.tensor([int((probability - 1 / draws).abs().argmin())])
    # The target is always in the batch once, which is its expected count for a probability of 1 / draws.
    probability[target] = 0
    probability *= (1 - 1 / draws) / probability.sum()
    probability[target] = 1 / draws
    logq = probability.log()
    counts = torch.bincount(torch.multinomial(probability, draws, True, generator=generator), minlength=num_items)
    nothing = torch.empty(1, 0, dtype=torch.int64)

    full = float(in_batch_softmax_loss(query, items, target, nothing))
    sampled, uncorrected, wrong = (
        float(in_batch_softmax_loss(query, items, target, nothing, logq=correction, counts=counts))
        for correction in (logq, None, -logq)
    )
    assert abs(sampled - full) < 0.05
    assert abs(uncorrected - full) > 1
    assert abs(wrong - full) > 1


def test_a_column_with_a_count_equals_its_repetitions() -> None:
    """Return a batch of sequences with repeated items: one column per distinct item, or one per position."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, 7, (4, 5), generator=generator)
    table = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    share = torch.rand(7, generator=generator, dtype=torch.float64).log()
    queries = torch.randn(4, 4, 3, generator=generator, dtype=torch.float64).flatten(0, 1)
    targets, users = sequences[:, 1:].flatten(), torch.arange(4).repeat_interleave(4)

    total = torch.zeros((), dtype=torch.float64)
    for m, (query, target) in enumerate(zip(queries, targets.tolist(), strict=True)):
        own = sequences[users[m]].tolist()
        negatives = [i for i in sequences.flatten().tolist() if i not in own]
        candidates = torch.tensor([target, *negatives])
        total = total - (table[candidates] @ query - share[candidates]).log_softmax(0)[0]

    distinct, rows, counts = sequences.flatten().unique(return_inverse=True, return_counts=True)
    rows = rows.view(4, 5)
    loss = in_batch_softmax_loss(
        queries, table[distinct], rows[:, 1:].flatten(), rows, users=users, logq=share[distinct], counts=counts
    )
    torch.testing.assert_close(loss, total / len(queries))


@pytest.mark.parametrize("num_items", [0, 4])
def test_no_queries_give_zero_and_zero_gradients(num_items: int) -> None:
    queries, items = torch.randn(0, 3, requires_grad=True), torch.randn(num_items, 3, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    loss = in_batch_softmax_loss(queries, items, none, none.view(0, 2))
    loss.backward()
    assert loss == 0
    assert queries.grad is not None
    torch.testing.assert_close(items.grad, torch.zeros(num_items, 3))


def test_a_query_that_rejects_every_item_costs_nothing() -> None:
    queries, items = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = in_batch_softmax_loss(queries, items, torch.tensor([1, 2]), torch.arange(4).expand(2, 4))
    loss.backward()
    assert loss == 0
    assert (queries.grad == 0).all()
    assert (items.grad == 0).all()


def test_the_target_is_a_candidate_once_even_if_rejected_or_counted() -> None:
    batch = make(6, 5, 3, 2, by_user=False)
    targets, rejected, counts = batch["targets"], batch["rejected"], batch["counts"]
    expected = in_batch_softmax_loss(**batch)
    listed = torch.cat([rejected, targets[:, None], targets[:, None]], dim=1)
    torch.testing.assert_close(in_batch_softmax_loss(**batch | {"rejected": listed}), expected, rtol=0, atol=0)
    for m in range(6):
        one = {"queries": batch["queries"][m : m + 1], "targets": targets[m : m + 1], "rejected": rejected[m : m + 1]}
        by_count = [
            in_batch_softmax_loss(**batch | one | {"counts": counts.index_fill(0, targets[m], times)})
            for times in (0, 1, 9)
        ]
        assert by_count[0] == by_count[1] == by_count[2]


def test_a_count_of_zero_is_never_a_negative_whatever_its_logit() -> None:
    batch = make(4, 5, 3, 1) | {"targets": torch.tensor([0, 1, 2, 3]), "counts": torch.tensor([1, 1, 1, 1, 0])}
    # An item that is never sampled has a logQ of -inf, and so a logit of +inf.
    logq = batch["logq"].index_fill(0, torch.tensor(4), -torch.inf)
    without = batch | {
        "items": batch["items"][:4],
        "logq": logq[:4],
        "counts": None,
        "rejected": batch["rejected"].clamp(max=3),
    }
    rejected = without["rejected"]
    actual = in_batch_softmax_loss(**batch | {"logq": logq, "rejected": rejected})
    torch.testing.assert_close(actual, in_batch_softmax_loss(**without))


INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_counts_of_any_dtype(dtype: torch.dtype) -> None:
    batch = make(4, 5, 3, 1) | {"counts": torch.tensor([1, 0, 1, 1, 0])}
    counts = batch["counts"].to(dtype)
    assert in_batch_softmax_loss(**batch | {"counts": counts}) == in_batch_softmax_loss(**batch)


@pytest.mark.parametrize("tile", [1, 1 << 18])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_of_items_that_no_query_may_draw_do_not_matter(value: float, tile: int) -> None:
    batch = make(4, 5, 3, 0, by_user=False) | {"targets": torch.tensor([0, 1, 2, 0])}
    # The last item but one is drawn never, the last one rejected by every query.
    batch |= {"counts": torch.tensor([1, 1, 1, 0, 2]), "rejected": torch.full((4, 1), 4)}
    with mock.patch.object(reference, "TILE", tile):
        expected = outputs(in_batch_softmax_loss, batch)
        batch["items"] = batch["items"].detach().index_fill(0, torch.tensor([3, 4]), value).requires_grad_()
        torch.testing.assert_close(outputs(in_batch_softmax_loss, batch), expected)


def test_an_item_that_may_be_drawn_hides_no_nan() -> None:
    batch = make(4, 5, 3, 0, by_user=False, counts=False)
    batch["items"] = batch["items"].detach().index_fill(0, torch.tensor(3), torch.nan).requires_grad_()
    loss, grad_queries, grad_items = outputs(in_batch_softmax_loss, batch)
    assert loss.isnan()
    assert grad_queries.isnan().all()
    assert grad_items.isnan().all()


def test_users_of_one_position_each() -> None:
    batch = make(3, 5, 2, 2, by_user=False)
    by_user = in_batch_softmax_loss(**batch | {"users": torch.arange(3)})
    assert by_user == in_batch_softmax_loss(**batch)


def test_large_logits_stay_finite() -> None:
    queries = torch.tensor([[100.0], [-100.0]], requires_grad=True)
    items = torch.tensor([[100.0], [-100.0], [99.0]], requires_grad=True)
    none = torch.empty(2, 0, dtype=torch.int64)
    loss = in_batch_softmax_loss(queries, items, torch.tensor([0, 0]), none)
    loss.backward()
    assert loss == 10_000
    assert queries.grad.isfinite().all()
    assert items.grad.isfinite().all()


def test_strided_inputs() -> None:
    batch = make(6, 5, 4, 2)
    strided = batch | {
        name: torch.stack([batch[name], batch[name]], dim=-1)[..., 0] for name in ("targets", "rejected", "users")
    }
    strided |= {name: batch[name].detach().T.contiguous().T.requires_grad_() for name in ("queries", "items")}
    torch.testing.assert_close(outputs(in_batch_softmax_loss, strided), outputs(in_batch_softmax_loss, batch))


def test_no_tensor_of_all_logits_exists() -> None:
    batch = rounded(make(1024, 1024, 8, 3), torch.float32)
    largest = largest_allocation(lambda: in_batch_softmax_loss(**batch).backward())
    assert largest <= 1024 * 1024 * 4 // 4


def test_opcheck() -> None:
    for options in ({}, {"by_user": False, "logq": False, "counts": False}):
        batch = make(6, 5, 3, 2, **options)
        if batch["counts"] is not None:
            batch["counts"] = batch["counts"].double()
        for ahead in (False, True):
            torch.library.opcheck(torch.ops.xsmoe.in_batch_softmax_loss, (*batch.values(), ahead, not options, "auto"))
        inputs = [t if t is None else t.detach() for t in batch.values()]
        _, lse, *_ = torch.ops.xsmoe.in_batch_softmax_loss(*inputs, False, False, "auto")
        grad = torch.tensor(0.5, dtype=torch.float64)
        torch.library.opcheck(
            torch.ops.xsmoe.in_batch_softmax_loss_backward, (*inputs, lse, None, None, grad, True, not options, "auto")
        )


def test_compiles_to_one_graph_with_unknown_sizes() -> None:
    batch = make(6, 5, 3, 2)
    expected = outputs(in_batch_softmax_loss, batch)
    unbacked(*batch.values())
    torch.testing.assert_close(outputs(compiled(in_batch_softmax_loss), batch), expected)


def test_compiles_with_inductor() -> None:
    batch = rounded(make(6, 5, 3, 2), torch.float32)

    def step(**batch: Any) -> Tensor:
        return in_batch_softmax_loss(**batch | {"queries": batch["queries"].tanh()})

    torch.testing.assert_close(outputs(compiled(step, backend="inductor"), batch), outputs(step, batch))


def test_autocast_casts_queries_and_items_only() -> None:
    # bfloat16 has no 301.
    batch = make(6, 5, 3, 2) | {"counts": torch.tensor([301, 1, 303, 2, 0])}
    low = rounded(batch, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *gradients = outputs(in_batch_softmax_loss, rounded(batch, torch.float32))
    torch.testing.assert_close(loss, in_batch_softmax_loss(**low), rtol=0, atol=0)
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]
    torch.testing.assert_close(loss, loop(**rounded(low, torch.float64)).float())


def test_the_reference_ran() -> None:
    batch = make(6, 5, 3, 2)
    before = dispatch.calls.copy()
    with dispatch.use_backend("reference"):
        loss = in_batch_softmax_loss(**batch)
    loss.backward()
    name = "in_batch_softmax_loss"
    assert dispatch.calls - before == {(name, "reference"): 1, (f"{name}_backward", "reference"): 1}


def index(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"queries": None}, TypeError, "queries must be a Tensor of shape (M, d), not NoneType"),
        ({"queries": torch.zeros(2)}, ValueError, "queries must have shape (M, d), not (2,)"),
        ({"queries": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "queries must be float32"),
        ({"items": torch.zeros(4, 5)}, ValueError, "items must have shape (C, 3), not (4, 5)"),
        ({"items": torch.zeros(4, 3).double()}, TypeError, "items is torch.float64, but queries is torch.float32"),
        ({"items": torch.zeros(4, 3, device="meta")}, ValueError, "items is on meta, but queries is on cpu"),
        ({"targets": index(0)}, ValueError, "targets must have shape (2,), not (1,)"),
        ({"targets": index(0, 1).int()}, TypeError, "targets must be int64, not torch.int32"),
        ({"targets": index(0, 4)}, ValueError, "targets must lie in [0, 4), but holds values from 0 to 4"),
        ({"targets": index(-1, 0)}, ValueError, "targets must lie in [0, 4)"),
        ({"rejected": index(0, 1)}, ValueError, "rejected must have shape (M, W), not (2,)"),
        ({"rejected": torch.zeros(3, 1).long()}, ValueError, "rejected must have shape (2, W), not (3, 1)"),
        ({"rejected": torch.zeros(2, 1)}, TypeError, "rejected must be int64, not torch.float32"),
        ({"rejected": index(0, 4).view(2, 1)}, ValueError, "rejected must lie in [-1, 4)"),
        ({"rejected": index(0, -2).view(2, 1)}, ValueError, "rejected must lie in [-1, 4)"),
        ({"users": index(0)}, ValueError, "users must have shape (2,), not (1,)"),
        ({"users": index(0, 2)}, ValueError, "users must lie in [0, 2)"),
        ({"logq": torch.zeros(3)}, ValueError, "logq must have shape (4,), not (3,)"),
        ({"logq": torch.zeros(4).long()}, TypeError, "logq must be float32"),
        ({"counts": torch.zeros(3)}, ValueError, "counts must have shape (4,), not (3,)"),
        ({"counts": torch.zeros(4, dtype=torch.complex64)}, TypeError, "counts must be of a real dtype"),
        ({"counts": torch.tensor([1.0, -1.0, 1.0, 1.0])}, ValueError, "counts must be 0 or more"),
        ({"counts": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, ValueError, "counts must be 0 or more"),
    ],
)
def test_bad_input_is_named(bad: Batch, error: type[Exception], message: str) -> None:
    good: Batch = {
        "queries": torch.zeros(2, 3),
        "items": torch.zeros(4, 3),
        "targets": index(0, 1),
        "rejected": index(0, -1).view(2, 1),
    }
    with pytest.raises(error, match=re.escape(message)):
        in_batch_softmax_loss(**good | bad)
