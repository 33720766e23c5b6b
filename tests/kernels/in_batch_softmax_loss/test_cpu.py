"""The native kernels of in_batch_softmax_loss against float64, within the error budget."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.backends.test_cpu_instruction_sets import emulation, needs_compiler
from tests.kernels.helpers.allocations import peak_allocation
from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.native_in_batch_softmax_loss import (
    DTYPES,
    SELECTION,
    Case,
    check,
    draw,
    outputs,
    outputs_of_halves,
)
from tests.kernels.helpers.native_library import TESTS, needs_library, run_python
from xsmoe_kernels import in_batch_softmax_loss, use_backend
from xsmoe_kernels.runtime import dispatch

pytestmark = needs_library

__all__ = ["emulation"]

COMPARISON = str(TESTS / "native_in_batch_softmax_loss.py")


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    st.builds(
        Case,
        queries=st.sampled_from([0, 1, 2, 13, 29, 33, 65, 129, 141, 145, 300]),
        items=st.sampled_from([1, 2, 15, 17, 33, 100, 511, 512, 513, 1025]),
        dim=st.sampled_from([0, 1, 3, 16, 17, 33, 64, 100, 128]),
        width=st.sampled_from([0, 1, 3, 11]),
        users=st.sampled_from([0, 1, 5]),
        logq=st.booleans(),
        counts=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        needed=st.tuples(st.booleans(), st.booleans()),
        seed=st.integers(0, 100),
    )
)
@example(Case(283, 2640, 128, 11, 26))
def test_stays_within_the_error_budget(case: Case) -> None:
    check(case)


@needs_compiler
def test_stays_within_the_error_budget_on_emulated_tiles(emulation: Path) -> None:
    assert run_python(COMPARISON, library=emulation, XSMOE_CPU_TIER="amx") == f"amx {len(SELECTION)}\n"


@pytest.mark.parametrize("case", SELECTION, ids=str)
def test_selected_cases_on_the_best_instruction_set(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("items", [700, 10_500])
@pytest.mark.parametrize("needed", [(False, False), (False, True), (True, False), (True, True)])
def test_every_subset_of_gradients(dtype: torch.dtype, items: int, needed: tuple[bool, bool]) -> None:
    check(Case(71, items, 33, 3, 5, dtype=dtype, needed=needed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("items", [700, 10_500])
def test_the_same_bits_again_on_any_number_of_threads(dtype: torch.dtype, items: int) -> None:
    case = Case(300, items, 48, 5, 9, dtype=dtype)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first, halves = check(case), outputs_of_halves(draw(case))
        for name, value in outputs(draw(case), "native").items():
            assert torch.equal(value, first[name]), f"{name} on {count} threads"
        for name, value in outputs_of_halves(draw(case)).items():
            assert torch.equal(value, halves[name]), f"{name} on {count} threads"


def same_as_reference(batch: dict[str, Any]) -> dict[str, Tensor]:
    # Shares that are rounded to bfloat16 before their products move small sums by more than their last bits.
    bounds = {"rtol": 0.05, "atol": 1e-3} if batch["items"].dtype == torch.bfloat16 else {}
    actual, expected = outputs(batch, "native"), outputs(batch, "reference")
    torch.testing.assert_close(actual, expected, equal_nan=True, **bounds)
    torch.testing.assert_close(outputs_of_halves(batch), expected, equal_nan=True, **bounds)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("items", [60, 10_500])
def test_values_of_items_that_no_query_may_draw_do_not_matter(dtype: torch.dtype, value: float, items: int) -> None:
    batch = draw(Case(40, items, 17, 3, 0, dtype=dtype))
    hidden = torch.tensor([3, 20, items - 1])
    counts = batch["counts"].clamp(min=1).index_fill(0, hidden[:2], 0)
    batch |= {"targets": batch["targets"].clamp(4, 19), "counts": counts}
    batch["rejected"] = batch["rejected"].index_fill(1, torch.tensor(1), items - 1)
    batch["items"] = batch["items"].detach().index_fill(0, hidden, value).requires_grad_()
    found = same_as_reference(batch)
    assert all(result.isfinite().all() for result in found.values())
    # A logQ of -inf makes the logit of such an item +inf.
    batch["logq"] = batch["logq"].index_fill(0, hidden, -torch.inf)
    same_as_reference(batch)


@pytest.mark.parametrize("items", [60, 10_500])
def test_an_item_that_may_be_drawn_hides_no_nan(items: int) -> None:
    batch = draw(Case(40, items, 17, counts=False))
    batch["targets"] = batch["targets"].clamp(max=items - 2)
    batch["items"] = batch["items"].detach().index_fill(0, torch.tensor(items - 1), torch.nan).requires_grad_()
    found = same_as_reference(batch)
    assert all(result.isnan().all() for result in found.values())


def test_a_query_that_is_not_finite_leaves_the_gradients_of_others_alone() -> None:
    batch = draw(Case(40, 60, 17))
    batch["queries"] = batch["queries"].detach().index_fill(0, torch.tensor(7), torch.nan).requires_grad_()
    found = same_as_reference(batch)
    assert found["queries"][:7].isfinite().all()
    assert found["queries"][8:].isfinite().all()


@pytest.mark.parametrize("logq", [torch.inf, -torch.inf])
def test_infinite_corrections_give_the_loss_of_the_reference(logq: float) -> None:
    batch = draw(Case(40, 60, 17, needed=(False, False)))
    batch["counts"] = batch["counts"].clamp(min=1)
    batch["logq"] = batch["logq"].index_fill(0, batch["targets"][:3], logq)
    same_as_reference(batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("items", [40, 600, 10_500])
def test_a_query_that_rejects_every_item_costs_nothing(dtype: torch.dtype, items: int) -> None:
    batch = draw(Case(17, items, 8, 0, dtype=dtype))
    batch["rejected"] = torch.arange(items).expand(17, items)
    for result in (*outputs(batch, "native").values(), *outputs_of_halves(batch).values()):
        assert (result == 0).all()


def test_strips_without_a_candidate() -> None:
    """The running sum begins after the items that a query rejects."""
    batch = draw(Case(17, 10_500, 8, counts=False)) | {"rejected": torch.arange(5000).expand(17, 5000)}
    batch["targets"] = batch["targets"].clamp(min=5000)
    same_as_reference(batch)


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_logits_far_from_zero(scale: float) -> None:
    batch = draw(Case(67, 1100, 16, 3))
    batch["queries"] = (batch["queries"].detach() * scale).requires_grad_()
    actual, expected = outputs(batch, "native"), outputs(batch, "reference")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_strided_inputs_and_other_dtypes_of_the_correction(dtype: torch.dtype) -> None:
    batch = draw(Case(30, 40, 9, 4, 5))
    batch |= {"logq": batch["logq"].to(dtype), "counts": batch["counts"].to(dtype)}
    strided = batch | {
        name: torch.stack([batch[name], batch[name]], dim=-1)[..., 0]
        for name in ("targets", "rejected", "users", "logq", "counts")
    }
    strided |= {name: batch[name].detach().T.contiguous().T.requires_grad_() for name in ("queries", "items")}
    torch.testing.assert_close(outputs(strided, "native"), outputs(batch, "native"), rtol=0, atol=0)
    same_as_reference(batch)


def test_hundreds_of_thousands_of_items() -> None:
    case = Case(5, 300_000, 4, 3, 2)
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [4090, 4096])
def test_more_queries_than_gradients_are_held_for_at_a_time(dtype: torch.dtype, dim: int) -> None:
    check(Case(4500, 20, dim, 2, 9, dtype=dtype))


def test_opcheck() -> None:
    batch = draw(Case(6, 5, 3, 2, 2))
    batch["counts"] = batch["counts"].float()
    operator, backward = torch.ops.xsmoe.in_batch_softmax_loss, torch.ops.xsmoe.in_batch_softmax_loss_backward
    for ahead in (False, True):
        torch.library.opcheck(operator, (*batch.values(), ahead, ahead, "native"))
        inputs = [t if t is None else t.detach() for t in batch.values()]
        _, lse, *gradients = operator(*inputs, ahead, ahead, "native")
        given = gradients if ahead else (None, None)
        torch.library.opcheck(backward, (*inputs, lse, *given, torch.tensor(0.5), True, True, "native"))


def test_compiles_with_inductor() -> None:
    batch = draw(Case(30, 40, 9, 4, 5))

    def step(**batch: Any) -> Tensor:
        return in_batch_softmax_loss(**batch | {"queries": batch["queries"].tanh()})

    loss = compiled(step, backend="inductor")(**batch)
    leaves = [batch["queries"], batch["items"]]
    found = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(step(**batch), leaves))


def test_gradients_come_with_the_loss_only_where_they_are_needed() -> None:
    batch = draw(Case(30, 40, 9))
    before = dispatch.calls.copy()
    with use_backend("native"):
        loss = in_batch_softmax_loss(**batch)
        with torch.no_grad():
            assert in_batch_softmax_loss(**batch) == loss
    torch.autograd.grad(loss, batch["queries"], retain_graph=True)
    name = "in_batch_softmax_loss"
    assert dispatch.calls - before == {(name, "native"): 2, (f"{name}_backward", "native"): 1}
    loss.backward()
    assert dispatch.calls - before == {(name, "native"): 2, (f"{name}_backward", "native"): 1}, "they were there"


def test_backward_runs_twice() -> None:
    batch = draw(Case(30, 40, 9))
    with use_backend("native"):
        loss = in_batch_softmax_loss(**batch)
    leaves = batch["queries"], batch["items"]
    first = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    kept = [t.clone() for t in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(second, tuple(t / 2 for t in kept))
    torch.testing.assert_close(torch.autograd.grad(4 * loss, leaves), tuple(2 * t for t in kept))


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_last_backward_copies_no_gradients(factor: float) -> None:
    batch = draw(Case(300, 200, 64))
    expected = outputs(batch, "native", factor)
    with use_backend("native"):
        loss = in_batch_softmax_loss(**batch)
    taken = peak_allocation(lambda: loss.backward(torch.tensor(factor)))
    assert taken < 1000
    for name in ("queries", "items"):
        torch.testing.assert_close(batch[name].grad, expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_does_not_grow_with_the_product_of_queries_and_items(dtype: torch.dtype) -> None:
    queries, items, dim = 2048, 2048, 16
    batch = draw(Case(queries, items, dim, 11, 200, dtype=dtype))

    def step() -> None:
        with use_backend("native"):
            in_batch_softmax_loss(**batch).backward()

    assert peak_allocation(step) < queries * items * 4 / 4


@pytest.mark.parametrize("sizes", [(2560, 2640, 128), (256, 450, 2048)], ids=str)
@pytest.mark.parametrize("count", [2, 16, 64])
def test_memory_hardly_grows_with_the_number_of_threads(count: int, sizes: tuple[int, int, int]) -> None:
    torch.set_num_threads(count)
    queries, items, dim = sizes
    batch = draw(Case(queries, items, dim, 11, 256))
    expected = outputs(batch, "reference", 1.0)

    def step() -> None:
        with use_backend("native"):
            in_batch_softmax_loss(**batch).backward()

    returned = 4 * (queries + items) * dim
    assert peak_allocation(step) < returned + (3 << 20)
    torch.testing.assert_close(batch["items"].grad, expected["items"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_without_queries_gradients_are_zero_whatever_the_loss_has(retain_graph: bool) -> None:
    batch = draw(Case(0, 9, 8))
    with use_backend("native"):
        loss = in_batch_softmax_loss(**batch)
    loss.backward(torch.tensor(torch.inf), retain_graph=retain_graph)
    assert torch.equal(batch["items"].grad, torch.zeros(9, 8))


def test_several_gradients_in_a_batch() -> None:
    batch = draw(Case(20, 30, 16))
    expected = outputs(batch, "native", 1.0)
    with use_backend("native"):
        loss = in_batch_softmax_loss(**batch)
    factors = torch.tensor([1.0, -2.0])
    (found,) = torch.autograd.grad(loss, batch["items"], factors, is_grads_batched=True)
    for gradient, factor in zip(found, factors, strict=True):
        torch.testing.assert_close(gradient, factor * expected["items"])


def test_gradients_that_the_operator_gave_its_caller_stay() -> None:
    batch = draw(Case(20, 30, 16, counts=False))
    rows = [batch[name] for name in ("queries", "items", "targets", "rejected", "users", "logq", "counts")]
    loss, _, *ahead = torch.ops.xsmoe.in_batch_softmax_loss(*rows, True, True, "native")
    before = [gradient.clone() for gradient in ahead]
    (7 * loss).backward()
    for gradient, was in zip(ahead, before, strict=True):
        assert torch.equal(gradient, was)
    torch.testing.assert_close(batch["items"].grad, 7 * before[1])
