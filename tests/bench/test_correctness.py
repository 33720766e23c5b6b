"""The comparison with float64 accepts right results, and refuses wrong ones with their error."""

import pytest
import torch
from torch import Tensor

from bench.core.correctness import Verdict, judge

ROWS, COLUMNS = 2000, 64


@pytest.fixture
def exact() -> Tensor:
    return torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def judged(found: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> Verdict:
    return judge({"y": found}, {"y": exact}, {"y": exact.to(dtype)}, dtype)


def test_rounding_passes_with_the_error_of_the_reference(exact: Tensor) -> None:
    verdict = judged(exact.float(), exact)
    assert verdict.refused is None
    assert verdict.ratio == pytest.approx(1)
    assert verdict.worst == "y"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_row_is_refused(exact: Tensor, dtype: torch.dtype) -> None:
    wrong = exact.to(dtype)
    wrong[17] = 0
    verdict = judged(wrong, exact, dtype)
    assert verdict.refused is not None
    assert "y: error" in verdict.refused


def test_the_budget_is_twice_the_error_of_the_reference_and_some_eps(exact: Tensor) -> None:
    coarse = exact.half().float()

    def judged_by_coarse(factor: float) -> Verdict:
        found = (exact + factor * (coarse - exact)).float()
        return judge({"y": found}, {"y": exact}, {"y": coarse}, torch.float32)

    assert judged_by_coarse(1.9).refused is None
    assert judged_by_coarse(1.9).ratio == pytest.approx(1.9, rel=1e-3)
    assert judged_by_coarse(2.1).refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(exact: Tensor, value: float) -> None:
    wrong = exact.float()
    wrong[3, 5] = value
    assert judged(wrong, exact).refused


def test_missing_and_misshapen_results_are_refused(exact: Tensor) -> None:
    assert judge({}, {"y": exact}, {"y": exact}, torch.float32).refused == "y is missing"
    assert judged(exact[1:].float(), exact).refused == "y is (1999, 64), not (2000, 64)"


def test_integers_must_be_equal() -> None:
    exact = {"experts": torch.tensor([1, 2, 3])}
    assert judge(exact, exact, exact, torch.float32).refused is None
    verdict = judge({"experts": torch.tensor([1, 3, 3])}, exact, exact, torch.float32)
    assert verdict.refused == "experts: 1 of 3 integers are wrong"


def test_an_exact_zero_allows_no_error() -> None:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert judged(zero.float(), zero).refused is None
    assert judged(zero.float() + 1e-9, zero).refused


def test_no_rows_are_right() -> None:
    assert judged(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.float64)).refused is None
