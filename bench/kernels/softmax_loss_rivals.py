"""Libraries that have the loss of a linear layer without its logits, an easier problem than `in_batch_softmax_loss`.

They know no items that a query rejects and no counts; what they get leaves logQ out as well.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from bench.shortage import first_line
from bench.workload import Absent

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The mean loss of queries (M, d), items (C, d) and targets (M,)."""

MODULES = {"cut-cross-entropy": "cut_cross_entropy", "liger": "liger_kernel.transformers"}
DEVICES = ("cuda",)
"""Where their kernels run."""


def loss_of(name: str, device: torch.device, dtype: torch.dtype) -> Loss:
    """A library's loss, as it is called by default.

    Raises:
        Absent: it is not installed, or does not run here.
    """
    if device.type not in DEVICES:
        raise Absent(f"{name} needs a CUDA device, not {device.type}")
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        raise Absent(f"{name} is not installed: {first_line(error)}") from error
    if name == "liger":
        criterion = module.LigerFusedLinearCrossEntropyLoss()

        def loss(queries: Tensor, items: Tensor, targets: Tensor) -> Tensor:
            return criterion(items, queries, targets)
    else:

        def loss(queries: Tensor, items: Tensor, targets: Tensor) -> Tensor:
            return module.linear_cross_entropy(queries, items, targets)

    _try(name, loss, device, dtype)
    return loss


def _try(name: str, loss: Loss, device: torch.device, dtype: torch.dtype) -> None:
    queries, items = (torch.zeros(rows, 32, device=device, dtype=dtype, requires_grad=True) for rows in (16, 64))
    try:
        loss(queries, items, torch.zeros(16, device=device, dtype=torch.int64)).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise Absent(f"{name} fails here: {first_line(error)}") from error
