"""Error budget of the kernels' tests: an error is compared with that of the reference in the same dtype."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 64
"""Draws over which a result is judged whose error in one draw exceeds its budget."""


class Compared(NamedTuple):
    """One result of one draw, in the order of `assert_within_budget`."""

    actual: Tensor
    reference: Tensor
    exact: Tensor


class BudgetExceeded(AssertionError):
    """An error exceeds its budget, or is NaN."""


def assert_within_budget(
    actual: Tensor, reference_same_dtype: Tensor, exact_f64: Tensor, name: str = "the result"
) -> None:
    """Fail unless `|actual - exact| <= 2 |reference - exact| + 4 eps |exact|`, where `|.|` is the Frobenius norm.

    Args:
        actual: the result under test.
        reference_same_dtype: an independent result, computed in the dtype of `actual`; eps is that of its dtype.
        exact_f64: the same in float64, from the same rounded inputs, of unit scale; finite everywhere.
        name: the name of the result in the failure's message.
    """
    assert exact_f64.dtype == torch.float64, f"{name}: the exact result must be float64, not {exact_f64.dtype}"
    assert actual.dtype == reference_same_dtype.dtype, f"{name}: {actual.dtype}, not {reference_same_dtype.dtype}"
    assert actual.shape == reference_same_dtype.shape == exact_f64.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(reference_same_dtype.shape)}, {tuple(exact_f64.shape)}"
    )
    assert torch.isfinite(exact_f64).all(), f"{name}: the exact result is not finite"
    exact = exact_f64.detach()
    error = torch.linalg.vector_norm(actual.detach().double() - exact)
    reference_error = torch.linalg.vector_norm(reference_same_dtype.detach().double() - exact)
    eps = torch.finfo(actual.dtype).eps
    budget = 2 * reference_error + 4 * eps * torch.linalg.vector_norm(exact)
    # A NaN in the result makes the comparison false, one in the reference must not excuse it.
    assert torch.isfinite(budget), f"{name}: the reference is not finite"
    if not error <= budget:
        raise BudgetExceeded(f"{name}: error {float(error):.3e}, budget {float(budget):.3e} ({actual.dtype})")


def assert_draws_within_budget(
    compare: Callable[[int], Mapping[str, Compared]],
    *,
    draws: int = 1,
    judge: Callable[[Tensor, Tensor, Tensor, str], None] = assert_within_budget,
) -> dict[str, Tensor]:
    """Fail unless every result stays within the error budget; return those of the first draw.

    The reference's error, which the budget is a multiple of, is itself random: where few numbers or few rows make most
    of it, it may be small by luck, and it differs between processors. A result whose error exceeds the budget is
    therefore judged again by its norms over `DRAWS` draws, the first ones included.

    Args:
        compare: computes the results of draw 0, 1, ..., of the same names and shapes in every draw.
        draws: the number of draws over which norms are taken at first.
        judge: raises BudgetExceeded for actual, reference and exact results, stacked over the draws, and a name.
    """
    compared = [compare(draw) for draw in range(draws)]

    def judge_all(name: str) -> None:
        actual, reference, exact = (torch.stack(t) for t in zip(*(draw[name] for draw in compared), strict=True))
        judge(actual, reference, exact, name)

    for name in compared[0]:
        try:
            judge_all(name)
        except BudgetExceeded:
            compared += [compare(draw) for draw in range(len(compared), DRAWS)]
            judge_all(name)
    return {name: one.actual for name, one in compared[0].items()}
