"""Grouped matrix products in plain PyTorch: the specification of `grouped_mm`."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, offsets: Tensor, num_frozen: int) -> Tensor:
    """Return `y[offsets[e]:offsets[e+1]] = x[offsets[e]:offsets[e+1]] @ weight[e]`, zeros in the other rows: (M, P)."""
    y = x.new_zeros(x.shape[0], weight.shape[2])
    for expert, rows, mask in _groups(offsets, x.shape[0]):
        y[rows] = _keep(x[rows] @ weight[expert], mask, y[rows])
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, num_frozen: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (M, K) and of weight (E, K, P), whose leading num_frozen experts stay zero."""
    grad_x = x.new_zeros(x.shape if need_x else 0)
    grad_weight = weight.new_zeros(weight.shape if need_weight else 0)
    for expert, rows, mask in _groups(offsets, x.shape[0]):
        if need_x:
            grad_x[rows] = _keep(grad[rows] @ weight[expert].T, mask, grad_x[rows])
        if need_weight and expert >= num_frozen:
            # Both operands are masked, because 0 times a NaN of a row outside the group would still be NaN.
            zero = x.new_zeros(())
            grad_weight[expert] = _keep(x[rows], mask, zero).T @ _keep(grad[rows], mask, zero)
    return grad_x, grad_weight


def _groups(offsets: Tensor, num_rows: int) -> Iterator[tuple[int, slice, Tensor | None]]:
    """Yield for each expert some rows and a mask (rows, 1) of those that belong to it; None if all do."""
    return _slices(offsets) if offsets.device.type == "cpu" else _masks(offsets, num_rows)


def _slices(offsets: Tensor) -> Iterator[tuple[int, slice, None]]:
    bounds = offsets.tolist()
    for expert, (first, last) in enumerate(itertools.pairwise(bounds)):
        yield expert, slice(first, last), None


def _masks(offsets: Tensor, num_rows: int) -> Iterator[tuple[int, slice, Tensor]]:
    # Slicing would wait for the offsets. Instead every expert multiplies all rows, and a mask selects its own.
    row = torch.arange(num_rows, device=offsets.device)[:, None]
    for expert in range(offsets.shape[0] - 1):
        yield expert, slice(None), (row >= offsets[expert]) & (row < offsets[expert + 1])


def _keep(value: Tensor, mask: Tensor | None, otherwise: Tensor) -> Tensor:
    return value if mask is None else torch.where(mask, value, otherwise)
