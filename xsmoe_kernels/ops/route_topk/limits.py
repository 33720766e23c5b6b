"""Limits of the GPU kernels of `route_topk`: their `rejects` functions for `dispatch.register`."""

from typing import Any

import torch
from torch import Tensor

MOST_EXPERTS = 1024


def rejects_forward(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    """Return why the kernels of `route_topk` cannot run a call, or None if they can."""
    return _too_many_experts(arguments[0]) if arguments else None


def rejects_backward(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    """Return the same for `route_topk_backward`."""
    return _too_many_experts(arguments[1]) if arguments else None


def _too_many_experts(logits: Tensor) -> str | None:
    if logits.shape[1] <= MOST_EXPERTS:
        return None
    return (
        f"logits has {logits.shape[1]} experts, but the GPU kernels support at most {MOST_EXPERTS};"
        ' use_backend("reference") supports more'
    )
