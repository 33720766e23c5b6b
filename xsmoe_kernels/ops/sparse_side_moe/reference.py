"""`sparse_side_moe` in plain PyTorch: the specification, which computes all experts and masks those not chosen."""

import torch
from torch import Tensor
from torch.nn import functional


def forward(
    x: Tensor,
    backbone: Tensor,
    router: Tensor,
    down: Tensor,
    up: Tensor,
    top_k: int,
    gate_offset: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (N, D), and the increments of the utilization's norm and gate (E+1,), in the dtype of the arguments."""
    logits = x @ router.T if gate_offset is None else x @ router.T + gate_offset
    chosen = logits[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    # Branch 0 is the backbone, which every row uses.
    branches = torch.cat([torch.zeros_like(chosen[:, :1]), chosen + 1], dim=1)
    masked = torch.full_like(logits, -torch.inf).scatter(1, branches, logits.gather(1, branches))
    gates = masked.softmax(1).expand(backbone.shape[0], -1)
    hidden = functional.gelu(torch.einsum("nd,erd->ner", x, down))
    experts = x[:, None] + torch.einsum("ner,erd->ned", hidden, up)
    outputs = torch.cat([backbone[:, None], experts.expand(backbone.shape[0], -1, -1)], dim=1)
    gated = gates[:, :, None] * outputs
    weight = torch.ones_like(gates[:, :1]) if row_weight is None else row_weight[:, None]
    return gated.sum(1), (weight * gated.norm(dim=2)).sum(0), (weight * gates).sum(0)
