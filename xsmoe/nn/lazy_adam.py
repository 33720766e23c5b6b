"""Adam that updates only the rows in the gradient if a parameter's gradient is sparse."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

UNSUPPORTED = ("weight_decay", "amsgrad", "maximize")
"""Settings of Adam that a lazy update does not support."""


class LazyAdam(torch.optim.Adam):
    """Adam (arXiv 1412.6980), fused for dense gradients and lazy for sparse ones.

    A parameter with a sparse gradient, such as the table of `ItemIds`, is updated row by row, as if each row had its
    own Adam optimizer. Entries of the same row are summed first. A row with a zero gradient keeps its weights, its
    moments and its step count. The state of this parameter is "step" (rows,) float32, and "exp_avg" and "exp_avg_sq" in
    the parameter's shape. After the first step, no step allocates or writes a tensor of the parameter's size.

    Shapes do not depend on values, and no operation synchronizes with a GPU, so a CUDA graph can capture a step. With
    `torch.amp.GradScaler`, a step that overflows changes no parameter. Gradients that are accumulated over several
    backward passes stay sparse. Sparse gradients must have one sparse dimension, the first.

    Args:
        params: parameters or parameter groups, as for every optimizer.
        lr: the learning rate. A Tensor on the parameters' device may change between replays of a CUDA graph.
        betas: decay rates of the first and the second moment.
        eps: added to the root of the second moment.

    Raises:
        RuntimeError: in `step`, if a parameter's gradients are sparse in one step and dense in another.
        ValueError: in `step`, if a sparse gradient is in a group with weight_decay, amsgrad or maximize, or with an eps
            of 0.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        # Adam's step calls this method to collect a group's dense gradients, and refuses sparse ones.
        dense = []
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            # `get` does not create an entry in the defaultdict.
            step = self.state[parameter].get("step") if parameter in self.state else None
            if step is not None and (step.dim() == 1) != gradient.is_sparse:
                found, before = ("sparse", "dense") if gradient.is_sparse else ("dense", "sparse")
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} has a {found} gradient, but had {before} ones in "
                    "earlier steps; build a new LazyAdam"
                )
            if gradient.is_sparse:
                self._update_rows(parameter, gradient, group)
            else:
                dense.append(parameter)
        return super()._init_group(group | {"params": dense}, *lists)

    def _update_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if given := [name for name in UNSUPPORTED if group[name]]:
            raise ValueError(
                f"{given[0]} is {group[given[0]]!r} in a group with a parameter with sparse gradients, whose rows are "
                f"updated without it; put that parameter into a group of its own, without {given[0]}"
            )
        if not group["eps"] > 0:
            raise ValueError(f"eps must be above 0 for a parameter with sparse gradients, not {group['eps']}")
        if gradient.sparse_dim() != 1:
            raise ValueError(f"a sparse gradient must have 1 sparse dimension, not {gradient.sparse_dim()}")
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(parameter.shape[0], dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        precise = torch.promote_types(parameter.dtype, torch.float32)
        rows, summed = _summed(gradient._indices()[0], gradient._values().flatten(1).to(precise))
        active = summed.any(dim=1)
        if (scale := getattr(self, "grad_scale", None)) is not None:
            summed = summed / scale.to(summed.device, non_blocking=True)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            active = active & (found_inf.to(active.device, non_blocking=True) == 0)
            summed = summed.masked_fill(~active[:, None], 0)

        weight, first, second = (
            values.flatten(1).index_select(0, rows).to(precise)
            for values in (parameter, state["exp_avg"], state["exp_avg_sq"])
        )
        steps = state["step"].index_select(0, rows) + active
        # An inactive row has weight zero here, so its values do not change. Its step count may still be 0.
        taken, moved = steps.clamp(min=1).to(precise)[:, None], active.to(precise)[:, None]
        beta1, beta2 = group["betas"]
        first = first.lerp_(summed, (1 - beta1) * moved)
        second = second.lerp_(summed.square(), (1 - beta2) * moved)
        # lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), with the corrections applied to row factors.
        root = _bias_correction(beta2, taken).sqrt_()
        size = root.div(_bias_correction(beta1, taken)).mul_(group["lr"]).mul_(moved)
        direction = first / second.sqrt().add_(root, alpha=group["eps"])
        weight = weight.addcmul_(direction, size, value=-1)

        # All entries of the same row have equal values here, so the order of writes does not matter.
        for target, values in (
            (parameter, weight),
            (state["exp_avg"], first),
            (state["exp_avg_sq"], second),
            (state["step"], steps),
        ):
            target.index_copy_(0, rows, values.to(target.dtype).view(-1, *target.shape[1:]))


def _summed(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sparse gradient's row indices (N,), and for each the sum of the row's entries (N, D)."""
    return (_summed_on_host if rows.device.type == "cpu" else _summed_in_place)(rows, values)


def _summed_on_host(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row once, without rows whose entries are all zero. Shapes depend on values."""
    used = values.any(dim=1).nonzero()[:, 0]
    if len(used) < len(rows):
        rows, values = rows.index_select(0, used), values.index_select(0, used)
    if (rows[1:] > rows[:-1]).all():
        return rows, values
    distinct, place = torch.unique(rows, return_inverse=True)
    return distinct, values.new_zeros(len(distinct), values.shape[1]).index_add_(0, place, values)


def _summed_in_place(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return every entry with the sum of its row's entries. Shapes are static, and the device is not synchronized."""
    rows, order = rows.sort()
    place = torch.searchsorted(rows, rows)
    sums = torch.zeros_like(values).index_add_(0, place, values.index_select(0, order))
    return rows, sums.index_select(0, place)


def _bias_correction(beta: float, steps: Tensor) -> Tensor:
    """Return 1 - beta^steps, accurate to rounding also for beta close to 1."""
    return torch.expm1(steps * (math.log(beta) if beta else -math.inf)).neg_()
