"""Adam whose parameters with sparse gradients are updated only at the rows that a step's gradient touches."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

UNSUPPORTED = ("weight_decay", "amsgrad", "maximize")
"""Settings of Adam that a lazy update has no rule for."""


class LazyAdam(torch.optim.Adam):
    """Adam (arXiv 1412.6980), fused for dense gradients and lazy for sparse ones.

    A parameter with a sparse gradient, such as the table of `ItemIds`, is updated one row at a time, as if each row had
    an Adam of its own: entries of one row are summed first, and a row whose gradient is zero keeps its weights, its
    moments and its step count. State of such a parameter: "step" (rows,) float32, "exp_avg" and "exp_avg_sq" in its
    shape. Beyond the first step nothing of the parameter's size is allocated or written.

    Shapes do not depend on values, and nothing waits for a GPU, so that a step can be captured in a CUDA graph. With
    `torch.amp.GradScaler` a step that overflows changes no parameter. Gradients that are accumulated over several
    backward passes stay sparse. Sparse gradients have one sparse dimension, the first.

    Args:
        params: parameters, or groups of them, as every optimizer takes them.
        lr: the learning rate; a Tensor on the parameters' device may change while a graph that reads it is replayed.
        betas: decay rates of the first and the second moment.
        eps: added to the root of the second moment.

    Raises:
        RuntimeError: in `step`, for a parameter whose gradients are sparse in one step and dense in another.
        ValueError: in `step`, for a sparse gradient in a group with weight_decay, amsgrad or maximize, or
            with an eps of 0.
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
        # Adam's step collects a group's dense gradients here, and refuses sparse ones.
        dense = []
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            # Looked up without making an entry.
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
                f"{given[0]} is {group[given[0]]!r} in a group with a parameter of sparse gradients, whose rows are "
                f"updated without it; put that parameter into a group of its own, without {given[0]}"
            )
        if not group["eps"] > 0:
            raise ValueError(f"eps must be above 0 for a parameter of sparse gradients, not {group['eps']}")
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
        # An inactive row, whose values stay to the bit because its weights here are zero, may have had no step yet.
        taken, moved = steps.clamp(min=1).to(precise)[:, None], active.to(precise)[:, None]
        beta1, beta2 = group["betas"]
        first = first.lerp_(summed, (1 - beta1) * moved)
        second = second.lerp_(summed.square(), (1 - beta2) * moved)
        # lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps), with the corrections taken out of the matrices.
        root = _bias_correction(beta2, taken).sqrt_()
        size = root.div(_bias_correction(beta1, taken)).mul_(group["lr"]).mul_(moved)
        direction = first / second.sqrt().add_(root, alpha=group["eps"])
        weight = weight.addcmul_(direction, size, value=-1)

        # A row that occurs more than once has the same values everywhere, so that it does not matter which are written.
        for target, values in (
            (parameter, weight),
            (state["exp_avg"], first),
            (state["exp_avg_sq"], second),
            (state["step"], steps),
        ):
            target.index_copy_(0, rows, values.to(target.dtype).view(-1, *target.shape[1:]))


def _summed(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """A sparse gradient's rows (N,), and for each the sum (N, D) of its entries."""
    return (_summed_on_host if rows.device.type == "cpu" else _summed_in_place)(rows, values)


def _summed_on_host(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Each row once, without those whose entries are all zero. Shapes depend on values."""
    used = values.any(dim=1).nonzero()[:, 0]
    if len(used) < len(rows):
        rows, values = rows.index_select(0, used), values.index_select(0, used)
    if (rows[1:] > rows[:-1]).all():
        return rows, values
    distinct, place = torch.unique(rows, return_inverse=True)
    return distinct, values.new_zeros(len(distinct), values.shape[1]).index_add_(0, place, values)


def _summed_in_place(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Every entry with the sum of all that its row has: static shapes, and nothing waits for the device."""
    rows, order = rows.sort()
    place = torch.searchsorted(rows, rows)
    sums = torch.zeros_like(values).index_add_(0, place, values.index_select(0, order))
    return rows, sums.index_select(0, place)


def _bias_correction(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps, exact to rounding where beta is close to 1."""
    return torch.expm1(steps * (math.log(beta) if beta else -math.inf)).neg_()
