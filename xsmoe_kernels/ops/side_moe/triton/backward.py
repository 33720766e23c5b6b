"""Launches of the backward of side levels: block sizes, results and scratch, and the order of the kernels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from xsmoe_kernels.ops.side_moe.triton import backward_kernels as kernels
from xsmoe_kernels.ops.side_moe.triton.forward import TILE, TILE_CANDIDATES, TILE_DEFAULTS
from xsmoe_kernels.ops.side_moe.triton.launch import (
    BackwardLevel,
    Launch,
    Level,
    in_launches,
    make_level,
    nothing,
    rank_block,
    strides,
    variables,
)
from xsmoe_kernels.ops.side_moe.triton.weight_kernels import weight_gradients
from xsmoe_kernels.triton_utils import kernel_helpers
from xsmoe_kernels.triton_utils.kernel_helpers import rows_in_place
from xsmoe_kernels.triton_utils.tuning import Config, Table, everywhere, make_config

# Two products share the registers: a wider tile would spill.
_GRADIENT_DEFAULTS = TILE_DEFAULTS | {
    ("sm_80", "half"): make_config(TILE, "128 64 32", 8, 4),
    ("sm_90", "half"): make_config(TILE, "128 64 64", 8, 4),
    ("sm_100", "half"): make_config(TILE, "128 64 64", 8, 4),
    ("sm_90", "tf32"): make_config(TILE, "128 64 32", 8, 4),
    ("sm_100", "tf32"): make_config(TILE, "128 64 32", 8, 4),
}
HIDDEN_GRADIENT = Table(
    "side_moe.hidden_gradient", _GRADIENT_DEFAULTS, make_config(TILE, "32 64 64", 4, 1), TILE_CANDIDATES
)

_ROWS = "BLOCK_N BLOCK_D BLOCK_K BLOCK_E"
ROW_GRADIENT = Table(
    "side_moe.row_gradient",
    {
        ("sm_80", "half"): make_config(_ROWS, "128 128 32 16", 8, 3),
        ("sm_90", "half"): make_config(_ROWS, "128 128 64 16", 8, 4),
        ("sm_100", "half"): make_config(_ROWS, "128 128 64 16", 8, 4),
        ("gfx942", "half"): make_config(_ROWS, "128 128 64 16", 8, 2),
        ("sm_80", "tf32"): make_config(_ROWS, "128 64 32 16", 8, 3),
        ("sm_90", "tf32"): make_config(_ROWS, "128 64 32 16", 8, 4),
        ("sm_100", "tf32"): make_config(_ROWS, "128 64 32 16", 8, 4),
        **everywhere(make_config(_ROWS, "64 64 16 16", 8, 2), "ieee"),
    },
    interpreted=make_config(_ROWS, "32 64 32 16", 4, 1),
    candidates=(
        make_config(_ROWS, "128 64 64 16", 4, 4),
        make_config(_ROWS, "64 128 64 16", 4, 4),
        make_config(_ROWS, "128 256 64 16", 8, 3),
        make_config(_ROWS, "64 64 32 16", 4, 3),
    ),
)

_COLUMNS = "BLOCK_N BLOCK_D SLICE"
COLUMN_SUM = Table(
    "side_moe.column_sum",
    everywhere(make_config(_COLUMNS, "32 128 256", 4, 2)),
    make_config(_COLUMNS, "16 32 48", 4, 1),
)
_SLICES = "BLOCK_N BLOCK_D"
ROW_SUM = Table(
    "side_moe.row_sum", everywhere(make_config(_SLICES, "32 64", 4, 2)), make_config(_SLICES, "16 32", 4, 1)
)
_LOGITS = "BLOCK_N BLOCK_E BLOCK_D"
LOGIT_GRADIENT = Table(
    "side_moe.logit_gradient",
    everywhere(make_config(_LOGITS, "16 16 64", 4, 2)),
    make_config(_LOGITS, "32 16 64", 4, 1),
)


LogitGradient = Callable[
    [Launch, Sequence[Tensor], list[Tensor], list[Tensor], list[Tensor], bool, bool],
    tuple[list[Tensor], list[Tensor]],
]
"""Type of `logit_gradient`."""


def logit_gradient(
    launch: Launch,
    grad: Sequence[Tensor],
    gates: list[Tensor],
    dots: list[Tensor],
    backbone_dot: list[Tensor],
    need_logits: bool,
    need_backbone: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of each level's logits and of its backbone; an empty list for one that is not needed.

    Those of logits are float32, because float16 has too small a range, and (rows of x, 16 ceil((E+1) / 16)), which
    allows wide loads.

    Args:
        launch: the levels.
        grad: the gradient of y, rows of any stride; the sum of the rows in float32 where x is one row.
        gates: (rows of x, E+1).
        dots: (rows of x, E * chunks), for each expert the terms of its gate's gradient other than grad . x, by chunk.
        backbone_dot: (1,), the sum of grad . backbone over all rows, where x is one row; else empty.
        need_logits, need_backbone: which gradients are needed.
    """
    levels = launch.levels
    grad_logits = (
        [gate.new_empty(len(gate), 16 * cdiv(level.experts + 1, 16)) for level, gate in zip(levels, gates, strict=True)]
        if need_logits
        else []
    )
    grad_backbone = [level.backbone.new_empty(level.backbone.shape) for level in levels] if need_backbone else []
    unused = [nothing(launch.like)] * len(levels)
    experts = levels[0].experts
    launch.run(
        LOGIT_GRADIENT,
        lambda config: launch.start(
            kernels.logit_gradient_kernel,
            cdiv(launch.most_rows, config.blocks["BLOCK_N"]),
            config,
            {
                "x": launch.x,
                "backbone": tuple(level.backbone for level in levels),
                "grad": tuple(grad),
                "gates": tuple(gates),
                "dots": tuple(dots),
                "backbone_dot": tuple(backbone_dot or gates),
                "grad_logits": tuple(grad_logits or gates),
                "grad_backbone": tuple(grad_backbone or unused),
                "x_strides": launch.x_strides,
                "backbone_strides": strides(level.backbone for level in levels),
                "grad_strides": strides(grad),
                "rows": launch.rows,
                "experts": launch.experts,
                "dims": launch.dims,
            },
            ONE_ROW=bool(backbone_dot),
            NEED_LOGITS=need_logits,
            NEED_BACKBONE=need_backbone,
            CHUNKS=dots[0].shape[1] // experts if need_logits else 1,
        ),
    )
    return grad_logits, grad_backbone


def backward(*arguments: Any, logit_gradient: LogitGradient = logit_gradient) -> tuple[Tensor, ...]:
    """Compute the gradients of `side_moe` as `reference.backward` specifies them.

    Args:
        arguments: those of `reference.backward`.
        logit_gradient: the kernel for rows; another backend may pass its own.
    """
    return tuple(
        results[0] for results in group_backward(*([argument] for argument in arguments), logit_gradient=logit_gradient)
    )


def group_backward(*arguments: list[Any], logit_gradient: LogitGradient = logit_gradient) -> tuple[list[Tensor], ...]:
    """Compute `backward` for lists with one entry per level."""
    results = in_launches(list(map(_backward_level, *arguments)), _backward_kind, partial(_backward, logit_gradient))
    return tuple(map(list, zip(*results, strict=True)))


def _backward_level(grad: Tensor, *arguments: Any) -> BackwardLevel:
    tensors, (_, gates, hidden, num_frozen, recompute, activation, *needs) = arguments[:7], arguments[7:]
    level = make_level(tensors, num_frozen, activation)
    return BackwardLevel(level, rows_in_place(grad), gates, hidden, recompute, *needs)


def _backward_kind(part: BackwardLevel) -> tuple[Any, ...]:
    return *part.level.kind, part.recompute, *part.needs


def _backward(logit_gradient: LogitGradient, parts: list[BackwardLevel]) -> list[tuple[Tensor, ...]]:
    levels, asked = [part.level for part in parts], parts[0]
    one_row = levels[0].one_row
    launch = Launch(levels, [level.x.shape[0] for level in levels])
    like = launch.like
    need_rows = asked.need_x or asked.need_router
    need_weights = asked.need_down or asked.need_up
    grad_x = [
        torch.empty_like(level.x, memory_format=torch.contiguous_format) if asked.need_x else nothing(like)
        for level in levels
    ]
    grad_backbone = [nothing(like) for _ in levels]
    grads = [part.grad for part in parts]
    wide_grads: list[Tensor] = grads
    backbone_dots: list[Tensor] = []
    if one_row:
        grad_backbone, sums, dots, blocks = launch.run(COLUMN_SUM, lambda config: _column_sums(launch, parts, config))
        if need_rows or need_weights:
            wide_grads, grads, backbone_dots = launch.run(
                ROW_SUM, lambda config: _row_sums(launch, sums, dots, blocks, config)
            )
    dots = grad_hidden = gated = grad_logits = [nothing(like)] * len(levels)
    if need_rows or need_weights:
        dots, grad_hidden, gated = launch.run(
            HIDDEN_GRADIENT,
            lambda config: _hidden_gradients(launch, parts, grads, config),
            recompute=asked.recompute,
            rows=need_rows,
            weights=need_weights,
        )
    need_backbone = asked.need_backbone and not one_row
    if need_rows or need_backbone:
        gates = [part.gates for part in parts]
        logits, backbones = logit_gradient(launch, wide_grads, gates, dots, backbone_dots, need_rows, need_backbone)
        grad_logits, grad_backbone = logits or grad_logits, backbones or grad_backbone
    if asked.need_x:
        launch.run(
            ROW_GRADIENT,
            lambda config: _row_gradients(launch, parts, wide_grads, grad_hidden, grad_logits, grad_x, config),
        )
    weights = [(nothing(like), nothing(like), nothing(like)) for _ in levels]
    if need_weights or asked.need_router:
        weights = weight_gradients(launch, parts, grads, grad_hidden, gated, grad_logits)
    return [
        (x, backbone, router, down, up)
        for x, backbone, (router, down, up) in zip(grad_x, grad_backbone, weights, strict=True)
    ]


def _column_sums(
    launch: Launch, parts: list[BackwardLevel], config: Config
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Return the backbone's gradients, sums and dots over slices of rows, and the numbers of column blocks."""
    levels, need_backbone = launch.levels, parts[0].need_backbone
    grad_backbone = [
        level.backbone.new_empty(level.backbone.shape) if need_backbone else nothing(launch.like) for level in levels
    ]
    blocks = [cdiv(level.dim, config.blocks["BLOCK_D"]) for level in levels]
    slices = [max(1, cdiv(level.rows, config.blocks["SLICE"])) for level in levels]
    sums = [part.gates.new_empty(number, level.dim) for part, level, number in zip(parts, levels, slices, strict=True)]
    dots = [part.gates.new_empty(number, block) for part, block, number in zip(parts, blocks, slices, strict=True)]
    launch.start(
        kernels.column_sum_kernel,
        max(number * block for number, block in zip(slices, blocks, strict=True)),
        config,
        {
            "grad": tuple(part.grad for part in parts),
            "backbone": tuple(level.backbone for level in levels),
            "gates": tuple(part.gates for part in parts),
            "grad_backbone": tuple(grad_backbone),
            "grad_sums": tuple(sums),
            "dots": tuple(dots),
            "grad_strides": strides(part.grad for part in parts),
            "backbone_strides": strides(level.backbone for level in levels),
            "rows": variables(level.rows for level in levels),
            "dims": launch.dims,
            "slices": variables(slices),
        },
        STORE_BACKBONE=need_backbone,
    )
    return grad_backbone, sums, dots, blocks


def _row_sums(
    launch: Launch, sums: list[Tensor], dots: list[Tensor], blocks: list[int], config: Config
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the gradient of a single row of x over all rows, wide and narrow, and the sum of grad . backbone."""
    wide = [total.new_empty(1, total.shape[1]) for total in sums]
    narrow = [launch.like.new_empty(total.shape) for total in wide]
    backbone_dots = [total.new_empty(1) for total in sums]
    launch.start(
        kernels.row_sum_kernel,
        cdiv(max(launch.dims), config.blocks["BLOCK_D"]),
        config,
        {
            "grad_sums": tuple(sums),
            "dots": tuple(dots),
            "row_grad": tuple(wide),
            "narrow_row_grad": tuple(narrow),
            "backbone_dot": tuple(backbone_dots),
            "dims": launch.dims,
            "slices": variables(len(total) for total in sums),
            "column_blocks": variables(blocks),
        },
    )
    return wide, narrow, backbone_dots


def _hidden_gradients(
    launch: Launch, parts: list[BackwardLevel], grads: list[Tensor], config: Config
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return dots (rows, E * chunks), gradients of hidden states, and gated activations."""
    levels, asked, like = launch.levels, parts[0], launch.like
    need_dots = asked.need_x or asked.need_router
    need_hidden = asked.need_x or asked.need_down
    chunks = launch.chunks(config)
    wanted = [0 if need_dots else level.trained for level in levels]
    stored = [0 if asked.need_x else level.trained for level in levels]

    def columns(level: Level, experts: int, need: bool, dtype: torch.dtype) -> Tensor:
        return like.new_empty(level.x.shape[0], experts, dtype=dtype) if need else nothing(like, dtype)

    dots = [columns(level, level.experts * chunks, need_dots, torch.float32) for level in levels]
    grad_hidden = [
        columns(level, (level.experts - first) * level.rank, need_hidden, like.dtype)
        for level, first in zip(levels, stored, strict=True)
    ]
    gated = [
        columns(level, (level.experts - level.trained) * level.rank, asked.need_up, like.dtype) for level in levels
    ]
    tiles = launch.most_tiles(config, wanted)
    launch.start(
        kernels.hidden_gradient_kernel,
        cdiv(launch.most_rows, config.blocks["BLOCK_N"]) * tiles,
        config,
        {
            "x": launch.x,
            "grad": tuple(grads),
            "frozen_down": tuple(level.frozen_down for level in levels),
            "down": tuple(level.down for level in levels),
            "frozen_up": tuple(level.frozen_up for level in levels),
            "up": tuple(level.up for level in levels),
            "gates": tuple(part.gates for part in parts),
            "hidden": tuple(part.hidden for part in parts),
            "dots": tuple(dots),
            "grad_hidden": tuple(grad_hidden),
            "gated": tuple(gated),
            "x_strides": launch.x_strides,
            "grad_strides": strides(grads),
            "rows": launch.rows,
            "frozen": launch.frozen,
            "experts": launch.experts,
            "trained": variables(level.trained for level in levels),
            "first_wanted": variables(wanted),
            "first_stored": variables(stored),
            "dims": launch.dims,
        },
        **launch.product_constants(config, "BLOCK_K"),
        RECOMPUTE=asked.recompute,
        NEED_GRAD=need_dots or need_hidden,
        NEED_DOTS=need_dots,
        NEED_HIDDEN=need_hidden,
        NEED_GATED=asked.need_up,
        ACTIVATION=levels[0].activation,
        RANK=launch.rank,
        RANK_BLOCK=rank_block(launch.rank),
    )
    return dots, grad_hidden, gated


def _row_gradients(
    launch: Launch,
    parts: list[BackwardLevel],
    grads: list[Tensor],
    grad_hidden: list[Tensor],
    grad_logits: list[Tensor],
    grad_x: list[Tensor],
    config: Config,
) -> None:
    """Compute the gradients of x."""
    levels = launch.levels
    launch.start(
        kernels.row_gradient_kernel,
        cdiv(launch.most_rows, config.blocks["BLOCK_N"]) * cdiv(max(launch.dims), config.blocks["BLOCK_D"]),
        config,
        {
            "grad": tuple(grads),
            "grad_hidden": tuple(grad_hidden),
            "grad_logits": tuple(grad_logits),
            "frozen_down": tuple(level.frozen_down for level in levels),
            "down": tuple(level.down for level in levels),
            "router": tuple(level.router for level in levels),
            "gates": tuple(part.gates for part in parts),
            "grad_x": tuple(grad_x),
            "grad_strides": strides(grads),
            "rows": launch.rows,
            "frozen": launch.frozen,
            "experts": launch.experts,
            "dims": launch.dims,
        },
        **launch.product_constants(config, "BLOCK_D"),
        WIDE_PRECISION=kernel_helpers.wide_precision(launch.like),
        RANK=launch.rank,
        RANK_BLOCK=rank_block(launch.rank),
    )
