"""Top-k routing in plain PyTorch: the specification of `route_topk`."""

import torch
from torch import Tensor

from xsmoe_kernels.runtime import precision


def forward(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gates (N, k), experts (N, k), order (N*k,) and offsets (E+1,), as `route_topk` describes them."""
    wide = precision.widen(logits)
    # The logits are sorted, not their softmax, which may have ties by rounding or underflow.
    experts = wide.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()
    by_expert, order = experts.flatten().sort(stable=True)
    # A search in the sorted experts counts them without a synchronization, which bincount needs.
    offsets = torch.searchsorted(by_expert, torch.arange(logits.shape[1] + 1, device=logits.device))
    return _gates(wide, experts, renormalize).to(logits.dtype), experts, order, offsets


def backward(grad: Tensor, logits: Tensor, experts: Tensor, renormalize: bool) -> Tensor:
    """Return the gradient of the logits (N, E); `grad` is that of the gates."""
    wide, grad = precision.widen(logits), precision.widen(grad)
    if renormalize:
        gates = _gates(wide, experts, renormalize)
        chosen = gates * (grad - (grad * gates).sum(1, keepdim=True))
        return torch.zeros_like(wide).scatter_(1, experts, chosen).to(logits.dtype)
    probabilities = wide.softmax(1)
    spread = torch.zeros_like(wide).scatter_(1, experts, grad)
    return (probabilities * (spread - (spread * probabilities).sum(1, keepdim=True))).to(logits.dtype)


def _gates(logits: Tensor, experts: Tensor, renormalize: bool) -> Tensor:
    # Dividing the chosen probabilities by their sum is a softmax over the chosen logits, and cannot divide 0 by 0.
    return logits.gather(1, experts).softmax(1) if renormalize else logits.softmax(1).gather(1, experts)
