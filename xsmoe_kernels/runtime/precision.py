"""The precision that the operators compute in: float32 for everything but float64."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that holds sums and softmaxes over values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(value: Tensor) -> Tensor:
    """`value` in its wide dtype; itself where it has that already."""
    return value.to(wide_dtype(value.dtype))
