"""Libraries that have the loss of a linear layer without its logits, an easier problem than `in_batch_softmax_loss`.

They know no items that a query rejects and no counts; what they get leaves logQ out as well.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels import rivals

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The mean loss of queries (M, d), items (C, d) and targets (M,)."""

MODULES = {"cut-cross-entropy": "cut_cross_entropy", "liger": "liger_kernel.transformers"}


def loss_of(name: str, device: torch.device, dtype: torch.dtype) -> Loss:
    """A library's loss, as it is called by default.

    Raises:
        Absent: it is not installed, or does not run here.
    """
    module = rivals.load(name, MODULES[name], device)
    if name == "liger":
        criterion = module.LigerFusedLinearCrossEntropyLoss()

        def loss(queries: Tensor, items: Tensor, targets: Tensor) -> Tensor:
            return criterion(items, queries, targets)
    else:

        def loss(queries: Tensor, items: Tensor, targets: Tensor) -> Tensor:
            return module.linear_cross_entropy(queries, items, targets)

    def trial() -> None:
        queries, items = (torch.zeros(rows, 32, device=device, dtype=dtype, requires_grad=True) for rows in (16, 64))
        loss(queries, items, torch.zeros(16, device=device, dtype=torch.int64)).backward()

    rivals.attempt(name, trial)
    return loss
