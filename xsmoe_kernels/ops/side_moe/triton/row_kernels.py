"""The kernels of a side level that go over rows and are no wide product: the part that another backend may do.

`forward.py` and `backward.py` call them through a `RowKernels`; TRITON launches those of this backend.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from xsmoe_kernels.ops.side_moe.triton import backward_kernels, configs, forward_kernels
from xsmoe_kernels.ops.side_moe.triton.launch import Launch, nothing, strides, variables
from xsmoe_kernels.triton_utils.tuning import Config


class Counted(NamedTuple):
    """What the counters of a launch's levels are made from.

    Attributes:
        gates: (rows of x, E+1) of each level.
        squares: (E+1, column blocks, rows of x), sums of squares of the backbone's rows and of each expert's outputs.
        backbone_squares: where x is one row, the backbone's (N,), which `squares` then leaves out; else empty.
        row_weight: (N,) of each level, or None.
    """

    gates: list[Tensor]
    squares: list[Tensor]
    backbone_squares: list[Tensor]
    row_weight: list[Tensor | None]


class GateGradients(NamedTuple):
    """What the gradients of a launch's logits are made from.

    Attributes:
        grad: the gradient of y, rows of any stride; where x is one row, the sum of them in float32.
        gates: (rows of x, E+1).
        dots: (rows of x, E * chunks), what each expert's gate takes beside grad . x, in chunks to be added up.
        backbone_dot: where x is one row, (1,), the sum of grad . backbone over all rows; else empty.
    """

    grad: Sequence[Tensor]
    gates: list[Tensor]
    dots: list[Tensor]
    backbone_dot: list[Tensor]


@dataclass(frozen=True)
class RowKernels:
    """A backend's kernels that go over rows, each for all levels of a launch.

    Attributes:
        gate: the gates (rows of x, E+1) of each level, float32.
        count: the increments of norm and gate (E+1,) of each level, float32.
        logit_gradient: asked for gradients of logits, of the backbone, or both. The former are float32, for float16
            has not their range, and (rows of x, 16 ceil((E+1) / 16)), for wide loads; what is not asked for is an empty
            list.
    """

    gate: Callable[[Launch], list[Tensor]]
    count: Callable[[Launch, Counted], tuple[list[Tensor], list[Tensor]]]
    logit_gradient: Callable[[Launch, GateGradients, bool, bool], tuple[list[Tensor], list[Tensor]]]


def _gate(launch: Launch) -> list[Tensor]:
    gates = [level.x.new_empty(level.x.shape[0], level.experts + 1, dtype=torch.float32) for level in launch.levels]
    launch.run(
        configs.GATE,
        lambda config: launch.start(
            forward_kernels.gate_kernel,
            cdiv(launch.most_rows, config.blocks["BLOCK_N"]),
            config,
            {
                "x": launch.x,
                "router": tuple(level.router for level in launch.levels),
                "gates": tuple(gates),
                "x_strides": launch.x_strides,
                "rows": launch.rows,
                "experts": launch.experts,
                "dims": launch.dims,
            },
            **launch.product_constants(config, "BLOCK_K"),
        ),
    )
    return gates


def _count(launch: Launch, counted: Counted) -> tuple[list[Tensor], list[Tensor]]:
    return launch.run(configs.COUNT, lambda config: _count_in_slices(launch, counted, config))


def _count_in_slices(launch: Launch, counted: Counted, config: Config) -> tuple[list[Tensor], list[Tensor]]:
    levels, gates = launch.levels, counted.gates
    # A slice at least, so that the sums over no rows are written.
    slices = [max(1, cdiv(level.rows, config.blocks["SLICE"])) for level in levels]
    norms, masses = (
        [gate.new_empty(number, level.experts + 1) for gate, level, number in zip(gates, levels, slices, strict=True)]
        for _ in range(2)
    )
    weights = [gate if weight is None else weight for gate, weight in zip(gates, counted.row_weight, strict=True)]
    launch.start(
        forward_kernels.count_kernel,
        max(number * (level.experts + 1) for number, level in zip(slices, levels, strict=True)),
        config,
        {
            "gates": tuple(gates),
            "backbone_squares": tuple(counted.backbone_squares or counted.squares),
            "expert_squares": tuple(counted.squares),
            "row_weight": tuple(weight.to(torch.float32).contiguous() for weight in weights),
            "norms": tuple(norms),
            "masses": tuple(masses),
            "weighted": variables(weight is not None for weight in counted.row_weight),
            "rows": variables(level.rows for level in levels),
            "experts": launch.experts,
            "column_blocks": variables(square.shape[1] for square in counted.squares),
            "slices": variables(slices),
        },
        ONE_ROW=levels[0].one_row,
    )
    return [_sum_of(norm) for norm in norms], [_sum_of(mass) for mass in masses]


def _sum_of(slices: Tensor) -> Tensor:
    return slices.sum(0) if len(slices) > 1 else slices.view(-1)


def _logit_gradient(
    launch: Launch, given: GateGradients, need_logits: bool, need_backbone: bool
) -> tuple[list[Tensor], list[Tensor]]:
    levels = launch.levels
    grad_logits = (
        [
            gate.new_empty(len(gate), 16 * cdiv(level.experts + 1, 16))
            for level, gate in zip(levels, given.gates, strict=True)
        ]
        if need_logits
        else []
    )
    grad_backbone = [level.backbone.new_empty(level.backbone.shape) for level in levels] if need_backbone else []
    unused = [nothing(launch.like)] * len(levels)
    experts = levels[0].experts
    launch.run(
        configs.LOGIT_GRADIENT,
        lambda config: launch.start(
            backward_kernels.logit_gradient_kernel,
            cdiv(launch.most_rows, config.blocks["BLOCK_N"]),
            config,
            {
                "x": launch.x,
                "backbone": tuple(level.backbone for level in levels),
                "grad": tuple(given.grad),
                "gates": tuple(given.gates),
                "dots": tuple(given.dots),
                "backbone_dot": tuple(given.backbone_dot or given.gates),
                "grad_logits": tuple(grad_logits or given.gates),
                "grad_backbone": tuple(grad_backbone or unused),
                "x_strides": launch.x_strides,
                "backbone_strides": strides(level.backbone for level in levels),
                "grad_strides": strides(given.grad),
                "rows": launch.rows,
                "experts": launch.experts,
                "dims": launch.dims,
            },
            ONE_ROW=bool(given.backbone_dot),
            NEED_LOGITS=need_logits,
            NEED_BACKBONE=need_backbone,
            CHUNKS=given.dots[0].shape[1] // experts if need_logits else 1,
        ),
    )
    return grad_logits, grad_backbone


TRITON = RowKernels(_gate, _count, _logit_gradient)
