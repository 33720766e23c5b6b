"""Our dropout against what torch's promises."""

import pytest
import torch

from xsmoe.nn.dropout import Dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.97])
def test_keeps_so_many_and_scales_them(rate: float) -> None:
    torch.manual_seed(0)
    count = 1 << 20
    kept = Dropout(rate)(torch.ones(count))
    values = kept.unique()
    assert values.numel() == 2
    assert values[0] == 0
    assert float(values[1]) == pytest.approx(1 / (1 - rate), rel=1e-3)
    spread = (rate * (1 - rate) / count) ** 0.5
    assert float((kept == 0).double().mean()) == pytest.approx(rate, abs=5 * spread + 2**-17)
    assert float(kept.double().mean()) == pytest.approx(1, abs=5 * spread / (1 - rate))


def test_the_four_numbers_of_a_word_are_dropped_alike() -> None:
    torch.manual_seed(0)
    dropped = (Dropout(0.3)(torch.ones(1 << 18, 4)) == 0).double()
    torch.testing.assert_close(dropped.mean(0), torch.full((4,), 0.3, dtype=torch.float64), atol=5e-3, rtol=0)
    correlation = torch.corrcoef(dropped.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.01


@pytest.mark.parametrize("shape", [(0,), (3,), (7, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradient_is_dropped_where_the_number_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = (torch.rand(shape) + 1).to(dtype).requires_grad_()
    y = Dropout(0.4)(x)
    assert y.dtype == dtype
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y)


def test_a_seed_repeats_it() -> None:
    layer, x = Dropout(0.4), torch.ones(1000)
    torch.manual_seed(5)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)


def test_nothing_is_dropped_in_evaluation_nor_kept_at_rate_one() -> None:
    x = torch.ones(9)
    assert torch.equal(Dropout(0.4).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(9))
