"""The error budget of the kernels' tests: an error is judged against the one that the reference makes in that dtype."""

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, reference_same_dtype: Tensor, exact_f64: Tensor, name: str = "the result"
) -> None:
    """Fails unless `|actual - exact| <= 2 |reference - exact| + 4 eps |exact|`, where `|.|` is the Frobenius norm.

    Args:
        actual: what is under test.
        reference_same_dtype: an independent result, computed in the dtype of `actual`; eps is that of its dtype.
        exact_f64: the same in float64, from the same rounded inputs, of unit scale; finite everywhere.
        name: what the failure's message calls the result.
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
    assert error <= budget, f"{name}: error {float(error):.3e}, budget {float(budget):.3e} ({actual.dtype})"
