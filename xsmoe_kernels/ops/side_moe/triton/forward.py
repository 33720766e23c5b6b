"""Launches of the forward of side levels: allocates results and scratch, and says which kernels run on what."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from xsmoe_kernels.ops.side_moe.triton import configs
from xsmoe_kernels.ops.side_moe.triton import forward_kernels as kernels
from xsmoe_kernels.ops.side_moe.triton.launch import Launch, in_launches, nothing, rank_block, strides, variables
from xsmoe_kernels.ops.side_moe.triton.levels import Level, make_level
from xsmoe_kernels.ops.side_moe.triton.row_kernels import TRITON, Counted, RowKernels
from xsmoe_kernels.triton_utils.tuning import Config


class ForwardLevel(NamedTuple):
    """A level, and what its forward is asked for."""

    level: Level
    row_weight: Tensor | None
    recompute: bool
    counted: bool


def forward(*arguments: Any, rows: RowKernels = TRITON) -> tuple[Tensor, ...]:
    """`side_moe` as `reference.forward` describes it; `rows` does what goes over rows."""
    return tuple(results[0] for results in group_forward(*([argument] for argument in arguments), rows=rows))


def group_forward(*arguments: list[Any], rows: RowKernels = TRITON) -> tuple[list[Tensor], ...]:
    """`forward` for lists, of one entry per level."""
    results = in_launches(list(map(_forward_level, *arguments)), _forward_kind, partial(_forward, rows))
    return tuple(map(list, zip(*results, strict=True)))


def _forward_level(*arguments: Any) -> ForwardLevel:
    tensors, (_, row_weight, num_frozen, recompute, counted, activation) = arguments[:7], arguments[7:]
    return ForwardLevel(make_level(tensors, num_frozen, activation), row_weight, recompute, counted)


def _forward_kind(part: ForwardLevel) -> tuple[Any, ...]:
    return *part.level.kind, part.counted


def _forward(rows: RowKernels, parts: list[ForwardLevel]) -> list[tuple[Tensor, ...]]:
    levels = [part.level for part in parts]
    one_row, count, activation = levels[0].one_row, parts[0].counted, levels[0].activation
    launch = Launch(levels, [level.x.shape[0] for level in levels])
    like = launch.like
    columns = [(level.x.shape[0], level.experts * level.rank) for level in levels]
    activated = [like.new_empty(shape) for shape in columns]
    hidden = [
        nothing(like) if part.recompute else like.new_empty(shape) for part, shape in zip(parts, columns, strict=True)
    ]
    y = [level.backbone.new_empty(level.backbone.shape) for level in levels]

    def hidden_states(config: Config) -> None:
        tiles = launch.most_tiles(config, [0] * len(levels))
        launch.start(
            kernels.hidden_kernel,
            cdiv(launch.most_rows, config.blocks["BLOCK_N"]) * tiles,
            config,
            {
                "x": launch.x,
                "frozen_down": tuple(level.frozen_down for level in levels),
                "down": tuple(level.down for level in levels),
                "gates": tuple(gates),
                "hidden": tuple(hidden),
                "activated": tuple(activated),
                "x_strides": launch.x_strides,
                "saves": variables(not part.recompute for part in parts),
                "rows": launch.rows,
                "frozen": launch.frozen,
                "experts": launch.experts,
                "dims": launch.dims,
            },
            **launch.product_constants(config, "BLOCK_K"),
            GATED=not count,
            ACTIVATION=activation,
            RANK=launch.rank,
            RANK_BLOCK=rank_block(launch.rank),
        )

    def mixture(config: Config) -> tuple[list[Tensor], list[Tensor]]:
        """The results, of one row with one_row, and the squares."""
        blocks = [cdiv(level.dim, config.blocks["BLOCK_D"]) for level in levels]
        results = [level.x.new_empty(1, level.dim, dtype=torch.float32) for level in levels] if one_row else y
        squares = [
            like.new_empty(level.experts + 1, number, level.x.shape[0], dtype=torch.float32)
            if count
            else nothing(like, torch.float32)
            for level, number in zip(levels, blocks, strict=True)
        ]
        launch.start(
            kernels.mixture_kernel,
            cdiv(launch.most_rows, config.blocks["BLOCK_N"]) * max(blocks),
            config,
            {
                "x": launch.x,
                "backbone": tuple(level.backbone for level in levels),
                "activated": tuple(activated),
                "frozen_up": tuple(level.frozen_up for level in levels),
                "up": tuple(level.up for level in levels),
                "gates": tuple(gates),
                "y": tuple(results),
                "squares": tuple(squares),
                "x_strides": launch.x_strides,
                "backbone_strides": strides(level.backbone for level in levels),
                "rows": launch.rows,
                "frozen": launch.frozen,
                "experts": launch.experts,
                "dims": launch.dims,
            },
            **launch.product_constants(config, "BLOCK_D"),
            ONE_ROW=one_row,
            COUNT=count,
            RANK=launch.rank,
            RANK_BLOCK=rank_block(launch.rank),
        )
        return results, squares

    gates = rows.gate(launch)
    launch.run(configs.HIDDEN, hidden_states, counted=count)
    results, squares = launch.run(configs.MIXTURE, mixture, counted=count, one_row=one_row)
    backbone_squares: list[Tensor] = []
    if one_row:
        backbone_squares = launch.run(
            configs.BROADCAST, lambda config: _broadcast(launch, gates, results, y, count, config)
        )
    if count:
        norms, masses = rows.count(
            launch, Counted(gates, squares, backbone_squares, [part.row_weight for part in parts])
        )
    else:
        norms, masses = ([nothing(like, torch.float32) for _ in levels] for _ in range(2))
    return list(zip(y, gates, hidden, norms, masses, strict=True))


def _broadcast(
    launch: Launch, gates: list[Tensor], mixture: list[Tensor], y: list[Tensor], count: bool, config: Config
) -> list[Tensor]:
    """Adds the backbone to the mixture that all rows share; returns the squares of the backbone's rows."""
    levels = launch.levels
    squares = [level.x.new_empty(level.rows if count else 0, dtype=torch.float32) for level in levels]
    launch.start(
        kernels.broadcast_kernel,
        cdiv(max(level.rows for level in levels), config.blocks["BLOCK_N"]),
        config,
        {
            "backbone": tuple(level.backbone for level in levels),
            "mixture": tuple(mixture),
            "gates": tuple(gates),
            "y": tuple(y),
            "squares": tuple(squares),
            "backbone_strides": strides(level.backbone for level in levels),
            "rows": variables(level.rows for level in levels),
            "dims": launch.dims,
        },
        COUNT=count,
    )
    return squares
