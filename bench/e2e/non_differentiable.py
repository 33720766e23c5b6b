"""Non-differentiable points: users whose gradients are decided by rounding and cannot be compared.

The slope of a ReLU jumps at an input of zero. Sparse routing jumps where two experts tie for the last of the k places.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from xsmoe.nn import Recommender
from xsmoe.nn.experts import ExpertBank
from xsmoe.stream.batches.builder import StepInput

NEAR = 1e-5
"""Relative to the RMS of the values; about ten times the error of float32."""


@torch.no_grad()
def differentiable_users(model: Recommender, step_input: StepInput) -> Tensor:
    """Return (B,) bool, False for users near a non-differentiable point.

    Args:
        model: in float64, without dropout.
        step_input: the input of the users' step, in float64.
    """
    batch = step_input.batch
    rows = torch.zeros(len(batch.inputs), dtype=torch.bool, device=batch.inputs.device)
    items = torch.zeros(len(batch.items), dtype=torch.bool, device=batch.inputs.device)
    with _watching(model, rows, items):
        model(step_input.hidden, batch)
    near = torch.zeros(batch.offsets.shape[0] - 1, dtype=torch.bool, device=rows.device)
    near[batch.users[rows]] = True
    near |= (items[batch.rejected.clamp(min=0)] & (batch.rejected >= 0)).any(1)
    return ~near


@contextmanager
def _watching(model: Recommender, rows: Tensor, items: Tensor) -> Iterator[None]:
    """Mark the rows whose ReLUs, and the items whose routing, are near a non-differentiable point."""

    def activation(_: object, __: object, inner: Tensor) -> None:
        rows.logical_or_((inner.abs() < NEAR * _rms(inner)).any(1))

    def routing(bank: ExpertBank, given: tuple[Tensor, ...], _: object) -> None:
        logits = given[0] @ bank.router[1:].T
        best = logits.topk(bank.top_k + 1).values if bank.top_k is not None else logits
        items.logical_or_(best[:, -2] - best[:, -1] < NEAR * _rms(logits))

    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if name.startswith("users.blocks.") and name.endswith(".inner"):
            handles.append(module.register_forward_hook(activation))
        if isinstance(module, ExpertBank) and module.top_k is not None and module.top_k < module.num_experts:
            handles.append(module.register_forward_hook(routing))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
