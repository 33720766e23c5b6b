"""packed_attention against a loop over sequences, heads and rows, and its gradients."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.compilation import compiled, unbacked
from tests.kernels.helpers.error_budget import assert_within_budget
from xsmoe_kernels.ops.packed_attention import packed_attention
from xsmoe_kernels.runtime import dispatch


def loop(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, keep: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Compute the result row by row and head by head, in the inputs' dtype; differentiable."""
    result = [[0 * v[m, h] for h in range(q.shape[1])] for m in range(len(q))]
    for b, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for m in range(first, last):
            for h in range(q.shape[1]):
                scores = k[first : m + 1, h] @ q[m, h] / math.sqrt(q.shape[2])
                shares = scores.softmax(0)
                if keep is not None:
                    shares = shares * keep[b, h, m - first, : m + 1 - first] / (1 - dropout_p)
                result[m][h] = shares @ v[first : m + 1, h]
    return torch.stack([torch.stack(row) for row in result]) if len(q) else 0 * v


def make(num_rows: int, heads: int = 2, dim: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, heads, dim)
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]


def outputs(function: Any, inputs: list[Tensor], *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    """Return the result and the gradients of q, k and v for an upstream gradient without equal entries."""
    y = function(*inputs, *arguments, **options)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad(y, inputs, upstream, allow_unused=True, materialize_grads=True)
    return y, *gradients


OFFSETS = torch.tensor([1, 4, 4, 5, 9])
"""Of 10 rows: sequences of 3, 0, 1 and 4, and a row that belongs to none at either end."""


@st.composite
def packings(draw: st.DrawFn) -> tuple[int, list[int]]:
    num_rows = draw(st.integers(0, 12))
    return num_rows, sorted(draw(st.lists(st.integers(0, num_rows), min_size=1, max_size=6)))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(packings(), st.integers(1, 3), st.integers(1, 5), st.integers(0, 3), st.integers(0, 100))
def test_equals_a_loop_over_rows(packing: tuple[int, list[int]], heads: int, dim: int, spare: int, seed: int) -> None:
    num_rows, bounds = packing
    inputs, offsets = make(num_rows, heads, dim, seed), torch.tensor(bounds)
    longest = max(offsets.diff().tolist(), default=0)
    actual = outputs(packed_attention, inputs, offsets, max_length=max(1, longest + spare))
    torch.testing.assert_close(actual, outputs(loop, inputs, offsets))


@pytest.mark.parametrize("needs", [(i & 1 > 0, i & 2 > 0, i & 4 > 0) for i in range(1, 8)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_of_every_subset(needs: tuple[bool, bool, bool], dropout_p: float) -> None:
    inputs = make(10, 1, 2)
    for tensor, need in zip(inputs, needs, strict=True):
        tensor.requires_grad_(need)

    def attend(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return packed_attention(*inputs, OFFSETS, max_length=4, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget(dtype: torch.dtype, dropout_p: float) -> None:
    inputs = [t.detach().to(dtype).requires_grad_() for t in make(21, 2, 16)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    offsets = torch.tensor([0, 9, 9, 10, 20])
    torch.manual_seed(0)
    actual = outputs(packed_attention, inputs, offsets, max_length=10, dropout_p=dropout_p)
    torch.manual_seed(0)
    keep = torch.rand(4, 2, 10, 10) >= dropout_p
    for name, *values in zip(
        ("y", "gradient of q", "gradient of k", "gradient of v"),
        actual,
        outputs(loop, inputs, offsets, keep, dropout_p),
        outputs(loop, exact, offsets, keep, dropout_p),
        strict=True,
    ):
        assert_within_budget(*values, name)


def test_rows_outside_the_offsets_are_zeros_whatever_they_hold() -> None:
    inputs = make(10)
    with torch.no_grad():
        for tensor in inputs:
            tensor[0], tensor[9] = math.nan, math.inf
    for result in outputs(packed_attention, inputs, OFFSETS, max_length=5):
        assert (result[[0, 9]] == 0).all()
        assert result.isfinite().all()


def test_a_sequence_of_one_row_returns_its_value() -> None:
    q, k, v = make(10)
    torch.testing.assert_close(packed_attention(q, k, v, OFFSETS, max_length=4)[4], v[4])


def test_no_rows_and_no_sequences() -> None:
    for num_rows, bounds in ((0, [0]), (0, [0, 0, 0]), (3, [0]), (3, [2, 2])):
        results = outputs(packed_attention, make(num_rows), torch.tensor(bounds), max_length=4)
        for result in results:
            assert result.shape == (num_rows, 2, 3)
            assert (result == 0).all()


def test_dropout_drops_some_weights_and_scales_the_others() -> None:
    ones = torch.ones(300, 4, 8)
    offsets = torch.arange(0, 301, 10)
    torch.manual_seed(0)
    y = packed_attention(ones, ones, ones, offsets, max_length=10, dropout_p=0.3)
    # A first row has one weight: it is dropped, or scaled by 1 / 0.7.
    first = y[::10].unique()
    torch.testing.assert_close(first, torch.tensor([0.0, 1 / 0.7]))
    assert abs(float(y.mean()) - 1) < 0.03
    torch.manual_seed(0)
    again = packed_attention(ones, ones, ones, offsets, max_length=10, dropout_p=0.3)
    torch.testing.assert_close(again, y, rtol=0, atol=0)
    assert (packed_attention(ones, ones, ones, offsets, max_length=10, dropout_p=0.3) != y).any()


def test_dropout_is_as_exact_as_float64() -> None:
    inputs = make(10)
    torch.manual_seed(0)
    actual = outputs(packed_attention, inputs, OFFSETS, max_length=4, dropout_p=0.3)
    torch.manual_seed(0)
    keep = torch.rand(4, 2, 4, 4) >= 0.3
    torch.testing.assert_close(actual, outputs(loop, inputs, OFFSETS, keep, 0.3), rtol=1e-12, atol=1e-12)


def test_lengths_change_nothing() -> None:
    inputs = make(10)
    expected = packed_attention(*inputs, OFFSETS, max_length=4)
    actual = packed_attention(*inputs, OFFSETS, max_length=4, lengths=[3, 0, 1, 4])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_strided_inputs_and_int32_offsets() -> None:
    inputs = make(10)
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in inputs]
    offsets = torch.stack([OFFSETS, OFFSETS], dim=1)[:, 0].int()
    torch.testing.assert_close(
        outputs(packed_attention, strided, offsets, max_length=4),
        outputs(packed_attention, inputs, OFFSETS, max_length=4),
    )


def test_dropout_is_kept_as_bool() -> None:
    for dtype in (torch.uint8, torch.float32):
        keep = torch.ones(4, 2, 4, 4, dtype=dtype)
        with pytest.raises(TypeError, match=f"keep must be bool, not {dtype}"):
            torch.ops.xsmoe.packed_attention(*make(10), OFFSETS, 4, keep, 0.3, None, "auto")


def test_opcheck() -> None:
    inputs = make(10)
    for keep, dropout_p in ((None, 0.0), (torch.rand(4, 2, 4, 4) >= 0.3, 0.3)):
        arguments = (OFFSETS, 4, keep, dropout_p, None)
        torch.library.opcheck(torch.ops.xsmoe.packed_attention, (*inputs, *arguments, "auto"))
        detached = [t.detach() for t in (inputs[0], *inputs)]
        needs = (True, keep is None, True)
        torch.library.opcheck(torch.ops.xsmoe.packed_attention_backward, (*detached, *arguments, *needs, "auto"))


def test_compiles_to_one_graph_with_unknown_sizes() -> None:
    inputs, offsets = make(10), OFFSETS.clone()
    expected = outputs(packed_attention, inputs, offsets, max_length=4)
    unbacked(*inputs, offsets)
    torch.testing.assert_close(outputs(compiled(packed_attention), inputs, offsets, max_length=4), expected)


def test_compiles_whole_with_dropout() -> None:
    ones, offsets = torch.ones(6, 1, 2), torch.tensor([0, 2, 6])
    unbacked(ones, offsets)
    y = compiled(packed_attention)(ones, ones, ones, offsets, max_length=4, dropout_p=0.5)
    assert set(y[0].flatten().tolist()) <= {0.0, 2.0}


def test_autocast_casts_q_k_and_v() -> None:
    q, k, v = (t.detach().float().requires_grad_() for t in make(10))
    low = [t.detach().bfloat16() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        y, *gradients = outputs(packed_attention, [q, k, v], OFFSETS, max_length=4)
    torch.testing.assert_close(y, packed_attention(*low, OFFSETS, max_length=4), rtol=0, atol=0)
    assert [g.dtype for g in gradients] == [torch.float32] * 3


def test_the_reference_ran() -> None:
    inputs = make(10)
    before = dispatch.calls.copy()
    with dispatch.use_backend("reference"):
        y = packed_attention(*inputs, OFFSETS, max_length=4)
    y.sum().backward()
    name = "packed_attention"
    assert dispatch.calls - before == {(name, "reference"): 1, (f"{name}_backward", "reference"): 1}


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"q": [1.0]}, TypeError, "q must be a Tensor of shape (M, H, d), not list"),
        ({"q": torch.zeros(4, 3)}, ValueError, "q must have shape (M, H, d), not (4, 3)"),
        ({"q": torch.zeros(4, 2, 3).long()}, TypeError, "q must be float32"),
        ({"k": torch.zeros(4, 1, 3)}, ValueError, "k must have shape (4, 2, 3), not (4, 1, 3)"),
        ({"v": torch.zeros(5, 2, 3)}, ValueError, "v must have shape (4, 2, 3), not (5, 2, 3)"),
        ({"v": torch.zeros(4, 2, 3).double()}, TypeError, "v is torch.float64, but q is torch.float32"),
        ({"k": torch.zeros(4, 2, 3, device="meta")}, ValueError, "k is on meta, but q is on cpu"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must have shape (B+1,), not (0,)"),
        ({"offsets": torch.tensor([0.0, 4.0])}, TypeError, "offsets must be int64 or int32"),
        ({"offsets": torch.tensor([0, 5])}, ValueError, "offsets must lie in [0, 5)"),
        ({"offsets": torch.tensor([0, 3, 2])}, ValueError, "offsets must ascend"),
        ({"max_length": 2}, ValueError, "max_length must be at least 3, the longest sequence of offsets, not 2"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, not 0"),
        ({"max_length": 3.0}, TypeError, "max_length must be an int, not float"),
        ({"max_length": True}, TypeError, "max_length must be an int, not bool"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float, not str"),
        ({"dropout_p": True}, TypeError, "dropout_p must be a float, not bool"),
        ({"dropout_p": torch.tensor(0.1)}, TypeError, "dropout_p must be a float, not Tensor"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p must lie in [0, 1), not nan"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must lie in [0, 1), not 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must lie in [0, 1), not -0.1"),
        ({"lengths": 4}, TypeError, "lengths must be a sequence of ints, such as a list, not int"),
        (
            {"lengths": torch.tensor([1, 3])},
            TypeError,
            "lengths must be a sequence of ints, such as a list, not Tensor",
        ),
        ({"lengths": np.array([1, 3])}, TypeError, "lengths must be a sequence of ints, such as a list, not ndarray"),
        ({"lengths": [1.0, 3.0]}, TypeError, "lengths must contain ints only, but has float"),
        ({"lengths": [1]}, ValueError, "lengths must have 2 entries, one per sequence of offsets, not 1"),
        ({"lengths": [1, 4]}, ValueError, "lengths must lie in [0, 3], max_length, but they go from 1 to 4"),
        ({"lengths": [2, 2]}, ValueError, "lengths must be the differences of offsets"),
    ],
)
def test_bad_input_is_named(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    rows = torch.zeros(4, 2, 3)
    good = {"q": rows, "k": rows, "v": rows, "offsets": torch.tensor([0, 1, 4]), "max_length": 3}
    with pytest.raises(error, match=re.escape(message)):
        packed_attention(**good | bad)
