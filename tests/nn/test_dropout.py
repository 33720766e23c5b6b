"""Tests of dropout: its probability, its mean, and equality with torch's module in all other cases."""

import pytest
import torch
from torch import nn

from xsmoe.nn.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_with_its_probability(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(401, 1003, dtype=dtype))
    dropped, kept = y.unique().tolist()
    assert dropped == 0
    assert abs(kept * (1 - p) - 1) < max(1e-4, torch.finfo(dtype).eps)
    # Five standard deviations.
    assert abs(float((y == 0).double().mean()) - p) < 5 * (p * (1 - p) / y.numel()) ** 0.5 + 1e-5
    for place in range(4):
        some = y.flatten()[place::4]
        assert abs(float((some == 0).double().mean()) - p) < 5 * (p * (1 - p) / some.numel()) ** 0.5 + 1e-5


def test_draws_from_torchs_generator() -> None:
    dropout, x = Dropout(0.4), torch.randn(50, 7)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


def test_gradient_is_the_mask() -> None:
    x = torch.randn(50, 7, requires_grad=True)
    y = Dropout(0.4)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad * x, y)
    assert (grad == 0).any()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing(p: float) -> None:
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(p)(x), (1 - p) * x)


def test_evaluation_strides_and_no_rows() -> None:
    x = torch.randn(5, 7).T
    assert Dropout(0.5).eval()(x) is x
    assert ((y := Dropout(0.5)(x)) == 0).logical_or(y == 2 * x).all()
    assert Dropout(0.5)(torch.zeros(0, 3)).shape == (0, 3)


def test_compiles() -> None:
    torch.compiler.reset()
    y = torch.compile(Dropout(0.5), backend="aot_eager", fullgraph=True)(torch.ones(30, 3))
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_is_torchs_module() -> None:
    assert isinstance(Dropout(0.1), nn.Dropout)


def test_the_four_numbers_of_a_word_are_dropped_independently() -> None:
    torch.manual_seed(0)
    dropped = (Dropout(0.3)(torch.ones(1 << 18, 4)) == 0).double()
    assert torch.corrcoef(dropped.T).fill_diagonal_(0).abs().max() < 0.01
