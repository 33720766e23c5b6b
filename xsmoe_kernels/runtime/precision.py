"""The precision in which operators compute: float32, and float64 for float64."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and softmaxes over values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(value: Tensor) -> Tensor:
    """Return `value` in its wide dtype, without a copy if it has that dtype."""
    return value.to(wide_dtype(value.dtype))
