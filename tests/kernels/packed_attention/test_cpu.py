"""The native packed_attention: error budget at any size, memory that it reads and writes, and its arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.allocations import peak_allocation
from tests.kernels.helpers.native_library import needs_library
from tests.kernels.helpers.native_packed_attention import DTYPES, NAME, SELECTION, Case, check, draw, outputs
from xsmoe_kernels import packed_attention, use_backend
from xsmoe_kernels.runtime import dispatch

pytestmark = needs_library

both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Return short and long sequences, some of them empty."""
    length = st.one_of(st.integers(0, 11), st.integers(0, 80))
    return Case(
        tuple(draw(st.lists(length, max_size=5))),
        heads=draw(st.integers(1, 3)),
        dim=draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 128]))),
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.6])),
        dtype=draw(st.sampled_from(DTYPES)),
        before=draw(st.integers(0, 2)),
        after=draw(st.integers(0, 2)),
        spare=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 100)),
    )


@settings(deadline=None, derandomize=True, max_examples=80)
@given(cases(), st.integers(1, 3))
def test_stays_within_the_error_budget(case: Case, count: int) -> None:
    torch.set_num_threads(count)
    check(case)


@pytest.mark.parametrize("case", SELECTION, ids=str)
def test_the_selection_stays_within_the_error_budget(case: Case) -> None:
    check(case)


@both_dtypes
def test_a_long_sequence(dtype: torch.dtype) -> None:
    check(Case((1030, 2), heads=1, dim=8, dtype=dtype))
    check(Case((300,), heads=1, dim=8, dropout_p=0.2, dtype=dtype))


def test_memory_does_not_grow_with_the_square_of_a_length() -> None:
    length, dim = 2000, 8
    case = Case((length,), heads=1, dim=dim)
    inputs = draw(case)
    assert peak_allocation(lambda: outputs(case, inputs, "native")) < 1_500 * length
    assert 1_500 * length < length * length * 4 / 5


@both_dtypes
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    case = Case((50, 1, 0, 7, 120, 30, 3, 9), dim=64, dropout_p=0.2, dtype=dtype)
    inputs, found = draw(case), []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        found.append(outputs(case, inputs, "native"))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@both_dtypes
@pytest.mark.parametrize("dim", [5, 16, 32])
def test_any_strides_and_int32_offsets(dtype: torch.dtype, dim: int) -> None:
    case = Case((10, 40, 3), dim=dim, dropout_p=0.2, dtype=dtype)
    inputs = draw(case)
    expected = outputs(case, inputs, "native")
    q, k, v, grad = inputs
    fused = torch.cat([t.flatten(1) for t in (q, k, v)], 1)
    slices = [t.unflatten(1, (case.heads, dim)) for t in fused.split(case.heads * dim, 1)]
    by_head = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    twice = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    for rows in ([*slices, grad], by_head, twice):
        assert any(not t.is_contiguous() for t in rows)
        for actual, wanted in zip(outputs(case, rows, "native"), expected, strict=True):
            assert torch.equal(actual, wanted)
    offsets = torch.stack([case.offsets, case.offsets], 1)[:, 0].int()
    with use_backend("native"):
        y = packed_attention(q, k, v, offsets, max_length=case.max_length)
        assert torch.equal(y, packed_attention(q, k, v, case.offsets, max_length=case.max_length))


def test_one_row_for_all() -> None:
    case = Case((4, 9), dim=16)
    q, k, v, grad = (t[:1].expand(case.num_rows, -1, -1) for t in draw(case))
    actual, expected = (outputs(case, [q, k, v, grad], backend) for backend in ("native", "reference"))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("needs", [(i & 1 > 0, i & 2 > 0, i & 4 > 0) for i in range(1, 8)])
@pytest.mark.parametrize("length", [6, 40])
def test_every_subset_of_gradients(needs: tuple[bool, bool, bool], length: int) -> None:
    case = Case((length, 3), dim=8)
    expected = outputs(case, draw(case), "native")[1:]
    q, k, v, grad = draw(case)
    found = torch.ops.xsmoe.packed_attention_backward(
        grad, q, k, v, case.offsets, case.max_length, None, 0.0, None, *needs, "native"
    )
    for actual, wanted, need in zip(found, expected, needs, strict=True):
        assert torch.equal(actual, wanted) if need else actual.numel() == 0


def test_a_later_row_changes_no_earlier_one() -> None:
    case = Case((70,), heads=1, dim=8)
    q, k, v, grad = draw(case)
    before = outputs(case, [q, k, v, grad], "native")[0]
    for rows in (q, k, v):
        rows[50:] += 1
    after = outputs(case, [q, k, v, grad], "native")[0]
    assert torch.equal(before[:50], after[:50])
    assert not torch.equal(before[50:], after[50:])


def test_large_scores_and_scores_that_are_not_finite() -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        v = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
        with use_backend("native"):
            return packed_attention(q.view(3, 1, 1), k.view(3, 1, 1), v, torch.tensor([0, 3]), max_length=3).flatten()

    ones = torch.ones(3)
    assert attend(100 * ones, torch.tensor([0.0, 1e3, 1e6])).tolist() == [1.0, 2.0, 4.0]
    assert attend(-100 * ones, torch.tensor([0.0, 1e3, 1e6])).tolist() == [1.0, 1.0, 1.0]
    assert attend(ones, torch.tensor([0.0, -torch.inf, 0.0]))[:2].tolist() == [1.0, 1.0]
    assert attend(ones, torch.tensor([0.0, torch.nan, 0.0])).isnan().tolist() == [False, True, True]


@both_dtypes
def test_auto_selects_it(dtype: torch.dtype) -> None:
    rows = torch.ones(3, 1, 4, dtype=dtype)
    before = dispatch.calls.copy()
    packed_attention(rows, rows, rows, torch.tensor([0, 3]), max_length=3)
    assert dispatch.calls - before == {(NAME, "native"): 1}


def test_opcheck() -> None:
    case = Case((3, 0, 1, 4), dim=3, before=1, after=1)
    q, k, v, grad = (t.nan_to_num() for t in draw(case))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    for keep, dropout_p in ((None, 0.0), (torch.rand(4, 2, 4, 4) >= 0.3, 0.3)):
        arguments = (case.offsets, 4, keep, dropout_p, None)
        torch.library.opcheck(torch.ops.xsmoe.packed_attention, (*leaves, *arguments, "native"))
        needs = (True, keep is None, True)
        torch.library.opcheck(torch.ops.xsmoe.packed_attention_backward, (grad, q, k, v, *arguments, *needs, "native"))
