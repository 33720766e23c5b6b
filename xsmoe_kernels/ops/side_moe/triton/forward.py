"""Launches of the forward of side levels: block sizes, results and scratch, and the order of the kernels."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from xsmoe_kernels.ops.side_moe.triton import forward_kernels as kernels
from xsmoe_kernels.ops.side_moe.triton.launch import (
    Launch,
    Level,
    in_launches,
    make_level,
    nothing,
    rank_block,
    strides,
    variables,
)
from xsmoe_kernels.triton_utils.tuning import Config, Table, everywhere, make_config

_GATE = "BLOCK_N BLOCK_E BLOCK_K"
GATE = Table(
    "side_moe.gate",
    {
        ("sm_80", "half"): make_config(_GATE, "32 16 128", 4, 3),
        ("sm_90", "half"): make_config(_GATE, "32 16 128", 4, 4),
        ("sm_100", "half"): make_config(_GATE, "32 16 128", 4, 4),
        ("gfx942", "half"): make_config(_GATE, "32 16 128", 4, 2),
        ("sm_80", "tf32"): make_config(_GATE, "32 16 64", 4, 3),
        ("sm_90", "tf32"): make_config(_GATE, "32 16 64", 4, 4),
        ("sm_100", "tf32"): make_config(_GATE, "32 16 32", 4, 4),
        **everywhere(make_config(_GATE, "32 16 32", 4, 2), "ieee"),
    },
    interpreted=make_config(_GATE, "32 16 64", 4, 1),
    candidates=(
        make_config(_GATE, "64 16 64", 4, 4),
        make_config(_GATE, "16 16 128", 4, 4),
        make_config(_GATE, "64 16 128", 8, 3),
    ),
)

TILE = "BLOCK_N BLOCK_C BLOCK_K"
TILE_DEFAULTS = {
    ("sm_80", "half"): make_config(TILE, "128 128 32", 8, 4),
    ("sm_90", "half"): make_config(TILE, "128 128 64", 8, 4),
    ("sm_100", "half"): make_config(TILE, "128 128 64", 8, 4),
    ("gfx942", "half"): make_config(TILE, "128 128 64", 8, 2),
    ("sm_80", "tf32"): make_config(TILE, "128 64 32", 8, 3),
    ("sm_90", "tf32"): make_config(TILE, "128 128 32", 8, 4),
    ("sm_100", "tf32"): make_config(TILE, "128 64 32", 8, 4),
    **everywhere(make_config(TILE, "64 64 16", 8, 2), "ieee"),
}
TILE_CANDIDATES = (
    make_config(TILE, "128 128 64", 8, 4),
    make_config(TILE, "128 64 64", 4, 4),
    make_config(TILE, "64 128 64", 4, 4),
    make_config(TILE, "128 256 64", 8, 3),
    make_config(TILE, "64 64 64", 4, 4),
    make_config(TILE, "64 64 32", 4, 3),
)
HIDDEN = Table("side_moe.hidden", TILE_DEFAULTS, make_config(TILE, "32 64 64", 4, 1), TILE_CANDIDATES)

_MIX = "BLOCK_N BLOCK_D BLOCK_K"
MIXTURE = Table(
    "side_moe.mixture",
    {
        ("sm_80", "half"): make_config(_MIX, "128 64 64", 8, 3),
        ("sm_90", "half"): make_config(_MIX, "128 128 64", 8, 4),
        ("sm_100", "half"): make_config(_MIX, "128 128 64", 8, 4),
        ("gfx942", "half"): make_config(_MIX, "128 64 64", 8, 2),
        ("sm_80", "tf32"): make_config(_MIX, "64 64 32", 4, 3),
        ("sm_90", "tf32"): make_config(_MIX, "128 64 32", 8, 4),
        ("sm_100", "tf32"): make_config(_MIX, "128 64 32", 8, 4),
        **everywhere(make_config(_MIX, "32 64 16", 4, 2), "ieee"),
        ("gfx942", "ieee"): make_config(_MIX, "64 64 16", 8, 2),
    },
    interpreted=make_config(_MIX, "32 64 32", 4, 1),
    candidates=(
        make_config(_MIX, "128 64 64", 8, 4),
        make_config(_MIX, "64 128 64", 4, 4),
        make_config(_MIX, "64 128 64", 8, 4),
        make_config(_MIX, "64 64 64", 4, 4),
        make_config(_MIX, "64 64 32", 4, 3),
    ),
)

BROADCAST = Table(
    "side_moe.broadcast",
    everywhere(make_config("BLOCK_N BLOCK_D", "16 256", 4, 2)),
    make_config("BLOCK_N BLOCK_D", "16 32", 4, 1),
)
_SLICED = "BLOCK_N SLICE"
COUNT = Table("side_moe.count", everywhere(make_config(_SLICED, "512 4096", 4, 2)), make_config(_SLICED, "32 64", 4, 1))


Gate = Callable[[Launch], list[Tensor]]
Count = Callable[
    [Launch, list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]], tuple[list[Tensor], list[Tensor]]
]
"""Types of `gate` and `count`."""


def gate(launch: Launch) -> list[Tensor]:
    """Return the gates (rows of x, E+1) of each level, float32."""
    gates = [level.x.new_empty(level.x.shape[0], level.experts + 1, dtype=torch.float32) for level in launch.levels]
    launch.run(
        GATE,
        lambda config: launch.start(
            kernels.gate_kernel,
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


def count(
    launch: Launch,
    gates: list[Tensor],
    squares: list[Tensor],
    backbone_squares: list[Tensor],
    row_weight: list[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the increments of norm and gate (E+1,) of each level, float32.

    Args:
        launch: the levels.
        gates: (rows of x, E+1) of each level.
        squares: (E+1, column blocks, rows of x), sums of squares of the backbone's rows and of each expert's outputs.
        backbone_squares: the backbone's sums (N,) where x is one row, and `squares` has none of the backbone; else
            empty.
        row_weight: (N,) of each level, or None.
    """
    return launch.run(
        COUNT, lambda config: _count_in_slices(launch, gates, squares, backbone_squares, row_weight, config)
    )


def _count_in_slices(
    launch: Launch,
    gates: list[Tensor],
    squares: list[Tensor],
    backbone_squares: list[Tensor],
    row_weight: list[Tensor | None],
    config: Config,
) -> tuple[list[Tensor], list[Tensor]]:
    levels = launch.levels
    # At least one slice: sums over no rows are written too.
    slices = [max(1, cdiv(level.rows, config.blocks["SLICE"])) for level in levels]
    norms, masses = (
        [gate.new_empty(number, level.experts + 1) for gate, level, number in zip(gates, levels, slices, strict=True)]
        for _ in range(2)
    )
    weights = [gate if weight is None else weight for gate, weight in zip(gates, row_weight, strict=True)]
    launch.start(
        kernels.count_kernel,
        max(number * (level.experts + 1) for number, level in zip(slices, levels, strict=True)),
        config,
        {
            "gates": tuple(gates),
            "backbone_squares": tuple(backbone_squares or squares),
            "expert_squares": tuple(squares),
            "row_weight": tuple(weight.to(torch.float32).contiguous() for weight in weights),
            "norms": tuple(norms),
            "masses": tuple(masses),
            "weighted": variables(weight is not None for weight in row_weight),
            "rows": variables(level.rows for level in levels),
            "experts": launch.experts,
            "column_blocks": variables(square.shape[1] for square in squares),
            "slices": variables(slices),
        },
        ONE_ROW=levels[0].one_row,
    )
    return [_sum_of(norm) for norm in norms], [_sum_of(mass) for mass in masses]


def _sum_of(slices: Tensor) -> Tensor:
    return slices.sum(0) if len(slices) > 1 else slices.view(-1)


class ForwardLevel(NamedTuple):
    """A level, and the options of its forward."""

    level: Level
    row_weight: Tensor | None
    recompute: bool
    counted: bool


def forward(*arguments: Any, gate: Gate = gate, count: Count = count) -> tuple[Tensor, ...]:
    """Compute `side_moe` as `reference.forward` specifies it.

    Args:
        arguments: those of `reference.forward`.
        gate, count: the kernels for rows; another backend may pass its own.
    """
    return tuple(
        results[0] for results in group_forward(*([argument] for argument in arguments), gate=gate, count=count)
    )


def group_forward(*arguments: list[Any], gate: Gate = gate, count: Count = count) -> tuple[list[Tensor], ...]:
    """Compute `forward` for lists with one entry per level."""
    results = in_launches(list(map(_forward_level, *arguments)), _forward_kind, partial(_forward, gate, count))
    return tuple(map(list, zip(*results, strict=True)))


def _forward_level(*arguments: Any) -> ForwardLevel:
    tensors, (_, row_weight, num_frozen, recompute, counted, activation) = arguments[:7], arguments[7:]
    return ForwardLevel(make_level(tensors, num_frozen, activation), row_weight, recompute, counted)


def _forward_kind(part: ForwardLevel) -> tuple[Any, ...]:
    return *part.level.kind, part.counted


def _forward(gate: Gate, count: Count, parts: list[ForwardLevel]) -> list[tuple[Tensor, ...]]:
    levels = [part.level for part in parts]
    one_row, counted, activation = levels[0].one_row, parts[0].counted, levels[0].activation
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
            GATED=not counted,
            ACTIVATION=activation,
            RANK=launch.rank,
            RANK_BLOCK=rank_block(launch.rank),
        )

    def mixture(config: Config) -> tuple[list[Tensor], list[Tensor]]:
        """Return the results, a single row with one_row, and the sums of squares."""
        blocks = [cdiv(level.dim, config.blocks["BLOCK_D"]) for level in levels]
        results = [level.x.new_empty(1, level.dim, dtype=torch.float32) for level in levels] if one_row else y
        squares = [
            like.new_empty(level.experts + 1, number, level.x.shape[0], dtype=torch.float32)
            if counted
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
            COUNT=counted,
            RANK=launch.rank,
            RANK_BLOCK=rank_block(launch.rank),
        )
        return results, squares

    gates = gate(launch)
    launch.run(HIDDEN, hidden_states, counted=counted)
    results, squares = launch.run(MIXTURE, mixture, counted=counted, one_row=one_row)
    backbone_squares: list[Tensor] = []
    if one_row:
        backbone_squares = launch.run(BROADCAST, lambda config: _broadcast(launch, gates, results, y, counted, config))
    if counted:
        norms, masses = count(launch, gates, squares, backbone_squares, [part.row_weight for part in parts])
    else:
        norms, masses = ([nothing(like, torch.float32) for _ in levels] for _ in range(2))
    return list(zip(y, gates, hidden, norms, masses, strict=True))


def _broadcast(
    launch: Launch, gates: list[Tensor], mixture: list[Tensor], y: list[Tensor], counted: bool, config: Config
) -> list[Tensor]:
    """Add the backbone to the mixture that all rows share; return the sums of squares of the backbone's rows."""
    levels = launch.levels
    squares = [level.x.new_empty(level.rows if counted else 0, dtype=torch.float32) for level in levels]
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
        COUNT=counted,
    )
    return squares
