"""What the kernels of `route_topk` for GPUs cannot take; `rejects` of theirs, as `dispatch.register` takes them."""

from typing import Any

import torch
from torch import Tensor

MOST_EXPERTS = 1024


def rejects_forward(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    """Why the kernels of `route_topk` cannot serve a call, or None if they can."""
    return _too_many_experts(arguments[0]) if arguments else None


def rejects_backward(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    """The same of `route_topk_backward`."""
    return _too_many_experts(arguments[1]) if arguments else None


def _too_many_experts(logits: Tensor) -> str | None:
    if logits.shape[1] <= MOST_EXPERTS:
        return None
    return (
        f"logits has {logits.shape[1]} experts, but the kernels for GPUs take at most {MOST_EXPERTS};"
        ' use_backend("reference") takes more'
    )
