"""Gradients of a side level's weights: kernels that sum over slices of rows, then over slices; and their launches."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from xsmoe_kernels.ops.side_moe.triton.device_functions import padded
from xsmoe_kernels.ops.side_moe.triton.launch import BackwardLevel, Launch, nothing, strides, variables
from xsmoe_kernels.triton_utils import kernel_helpers
from xsmoe_kernels.triton_utils.kernel_helpers import narrow, pick, product, variable
from xsmoe_kernels.triton_utils.tuning import Config, Table, everywhere, make_config

_WEIGHT = "BLOCK_C BLOCK_D BLOCK_K"
WEIGHT_GRADIENT = Table(
    "side_moe.weight_gradient",
    {
        ("sm_80", "half"): make_config(_WEIGHT, "64 128 64", 4, 3),
        ("sm_90", "half"): make_config(_WEIGHT, "64 128 64", 4, 4),
        ("sm_100", "half"): make_config(_WEIGHT, "64 128 64", 4, 4),
        ("gfx942", "half"): make_config(_WEIGHT, "64 128 64", 4, 2),
        ("sm_80", "tf32"): make_config(_WEIGHT, "64 64 32", 4, 3),
        ("sm_90", "tf32"): make_config(_WEIGHT, "64 64 32", 4, 4),
        ("sm_100", "tf32"): make_config(_WEIGHT, "64 64 32", 4, 4),
        **everywhere(make_config(_WEIGHT, "64 64 16", 8, 2), "ieee"),
    },
    interpreted=make_config(_WEIGHT, "32 64 16", 4, 1),
    candidates=(
        make_config(_WEIGHT, "64 64 64", 4, 4),
        make_config(_WEIGHT, "64 256 64", 8, 3),
        make_config(_WEIGHT, "64 64 32", 4, 4),
    ),
)
WEIGHT_SUM = Table(
    "side_moe.weight_sum", everywhere(make_config("BLOCK_D", "512", 4, 2)), make_config("BLOCK_D", "32", 4, 1)
)


@triton.jit
def weight_gradient_kernel(
    x,
    grad,
    grad_hidden,
    gated,
    grad_logits,
    parts,
    x_strides,
    grad_strides,
    hidden_offsets,
    hidden_columns,
    gated_columns,
    logit_columns,
    rows,
    slices,
    dims,
    RANK_UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE_PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute parts (slices, columns, D): for each slice of rows grad_hidden^T x, gated^T grad and grad_logits^T x.

    The columns of grad_hidden from `hidden_offsets` on are used. Columns of hidden states are counted in units of
    RANK_UNIT, which divides R.
    """
    level = tl.program_id(1)
    count, dim, num_slices = variable(pick(rows, level)), pick(dims, level), variable(pick(slices, level))
    down_columns = variable(pick(hidden_columns, level)) * RANK_UNIT
    up_columns = variable(pick(gated_columns, level)) * RANK_UNIT
    router_columns = variable(pick(logit_columns, level))
    blocks = tl.cdiv(dim, BLOCK_D)
    down_tiles, up_tiles = tl.cdiv(down_columns, BLOCK_C), tl.cdiv(up_columns, BLOCK_C)
    tiles = down_tiles + up_tiles + tl.cdiv(router_columns, BLOCK_C)
    column_block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if rest >= tiles * num_slices:
        return
    tile, part = rest % tiles, rest // tiles
    is_down, is_up = tile < down_tiles, (tile >= down_tiles) & (tile < down_tiles + up_tiles)
    skipped = variable(pick(hidden_offsets, level)) * RANK_UNIT
    own_columns = tl.where(is_down, down_columns, tl.where(is_up, up_columns, router_columns))
    own_tile = tile - tl.where(is_down, 0, down_tiles) - tl.where(is_down | is_up, 0, up_tiles)
    stacked = tl.where(is_down, 0, down_columns) + tl.where(is_down | is_up, 0, up_columns)
    index = own_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    column = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    # Slices are whole blocks of rows of nearly equal number.
    slice_rows = tl.cdiv(tl.cdiv(count, BLOCK_K), num_slices) * BLOCK_K
    begin = part * slice_rows
    end = min(begin + slice_rows, count)
    if is_down | is_up:
        total = _transposed_times(
            tl.where(is_down, pick(grad_hidden, level) + skipped, pick(gated, level)),
            tl.where(is_down, skipped + down_columns, up_columns),
            index,
            own_columns,
            tl.where(is_up, pick(grad, level), pick(x, level)),
            tl.where(is_up, pick(grad_strides, level), pick(x_strides, level)),
            column,
            dim,
            begin,
            end,
            EVEN,
            PRECISION,
            BLOCK_C,
            BLOCK_D,
            BLOCK_K,
        )
    else:
        # The padding of the columns is read too, because it affects only rows that are not stored.
        total = _transposed_times(
            pick(grad_logits, level),
            padded(router_columns),
            index,
            padded(router_columns),
            pick(x, level),
            pick(x_strides, level),
            column,
            dim,
            begin,
            end,
            EVEN,
            WIDE_PRECISION,
            BLOCK_C,
            BLOCK_D,
            BLOCK_K,
        )
    height = down_columns + up_columns + router_columns
    place = (part.to(tl.int64) * height + stacked + index)[:, None] * dim + column[None, :]
    tl.store(pick(parts, level) + place, total, mask=(index < own_columns)[:, None] & (column < dim)[None, :])


@triton.jit
def _transposed_times(
    left,
    left_stride,
    index,
    left_columns,
    right,
    right_stride,
    column,
    dim,
    begin,
    end,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return left^T right over the rows from `begin` to `end`, in the dtype of left."""
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for first in range(begin, end, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = row < end
        right_mask = inside[:, None]
        if not EVEN:
            right_mask = right_mask & (column < dim)[None, :]
        states = tl.load(
            left + index[:, None] + row[None, :] * left_stride,
            mask=inside[None, :] & (index < left_columns)[:, None],
            other=0.0,
        )
        values = tl.load(right + row[:, None] * right_stride + column[None, :], mask=right_mask, other=0.0)
        total = product(states, values.to(states.dtype), total, PRECISION)
    return total


@triton.jit
def weight_sum_kernel(
    parts,
    grad_down,
    grad_up,
    grad_router,
    frozen_columns,
    hidden_columns,
    gated_columns,
    logit_columns,
    slices,
    dims,
    RANK_UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over slices into the gradients of down, up and router, with zeros for `frozen_columns` leading columns of
    down and up. A program computes one row of D numbers."""
    level = tl.program_id(1)
    dim, num_slices = pick(dims, level), variable(pick(slices, level))
    down_columns = variable(pick(hidden_columns, level)) * RANK_UNIT
    up_columns = variable(pick(gated_columns, level)) * RANK_UNIT
    router_columns, zeros = variable(pick(logit_columns, level)), variable(pick(frozen_columns, level))
    down_rows = tl.where(down_columns > 0, down_columns + zeros, 0)
    up_rows = tl.where(up_columns > 0, up_columns + zeros, 0)
    number = tl.program_id(0)
    if number >= down_rows + up_rows + router_columns:
        return
    is_down, is_up = number < down_rows, (number >= down_rows) & (number < down_rows + up_rows)
    own = number - tl.where(is_down, 0, down_rows) - tl.where(is_down | is_up, 0, up_rows)
    target = tl.where(is_down, pick(grad_down, level), tl.where(is_up, pick(grad_up, level), pick(grad_router, level)))
    own_zeros = tl.where(is_down | is_up, zeros, 0)
    stacked = tl.where(is_down, 0, down_columns) + tl.where(is_down | is_up, 0, up_columns) + own - own_zeros
    height = (down_columns + up_columns + router_columns).to(tl.int64) * dim
    for first in range(0, dim, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < dim
        total = tl.zeros((BLOCK_D,), tl.float32)
        for part in range(num_slices):
            place = part * height + stacked.to(tl.int64) * dim + column
            total += tl.load(pick(parts, level) + place, mask=inside & (own >= own_zeros), other=0.0)
        tl.store(target + own.to(tl.int64) * dim + column, narrow(total, grad_router[0]), mask=inside)


def weight_gradients(
    launch: Launch,
    parts: list[BackwardLevel],
    grads: list[Tensor],
    grad_hidden: list[Tensor],
    gated: list[Tensor],
    grad_logits: list[Tensor],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the gradients of router, down and up: sums over slices of rows, then over the slices."""
    levels, asked, like = launch.levels, parts[0], launch.like
    trained_columns = [(level.experts - level.trained) * level.rank for level in levels]
    hidden_columns = [number * asked.need_down for number in trained_columns]
    # If x has a gradient, the gradients of frozen experts' hidden states come first.
    hidden_offsets = [level.trained * level.rank * asked.need_x for level in levels]
    gated_columns = [number * asked.need_up for number in trained_columns]
    logit_columns = [(level.experts + 1) * asked.need_router for level in levels]
    heights = [sum(columns) for columns in zip(hidden_columns, gated_columns, logit_columns, strict=True)]
    unit = math.gcd(launch.rank, 16)
    columns = {
        "hidden_columns": variables(number // unit for number in hidden_columns),
        "gated_columns": variables(number // unit for number in gated_columns),
        "logit_columns": variables(logit_columns),
    }

    def products(config: Config) -> tuple[list[Tensor], list[int]]:
        """Return the sums over slices, and the number of slices."""
        blocks = config.blocks
        tiles = [
            sum(cdiv(number, blocks["BLOCK_C"]) for number in level_columns) * cdiv(level.dim, blocks["BLOCK_D"])
            for level, *level_columns in zip(levels, hidden_columns, gated_columns, logit_columns, strict=True)
        ]
        # Depends on the level alone, so that its sums are the same in any launch.
        slices = [
            max(
                1,
                min(cdiv(kernel_helpers.ENOUGH_PROGRAMS, max(1, tile)), cdiv(level.x.shape[0], 4 * blocks["BLOCK_K"])),
            )
            for level, tile in zip(levels, tiles, strict=True)
        ]
        sums = [
            torch.empty(number, height, level.dim, dtype=torch.float32, device=like.device)
            for number, height, level in zip(slices, heights, levels, strict=True)
        ]
        launch.start(
            weight_gradient_kernel,
            max(tile * number for tile, number in zip(tiles, slices, strict=True)),
            config,
            {
                "x": launch.x,
                "grad": tuple(grads),
                "grad_hidden": tuple(grad_hidden),
                "gated": tuple(gated),
                "grad_logits": tuple(grad_logits),
                "parts": tuple(sums),
                "x_strides": launch.x_strides,
                "grad_strides": strides(grads),
                "hidden_offsets": variables(offset // unit for offset in hidden_offsets),
                **columns,
                "rows": launch.rows,
                "slices": variables(slices),
                "dims": launch.dims,
            },
            **launch.product_constants(config, "BLOCK_D"),
            WIDE_PRECISION=kernel_helpers.wide_precision(like),
            RANK_UNIT=unit,
        )
        return sums, slices

    sums, slices = launch.run(WEIGHT_GRADIENT, products)
    routers = [torch.empty_like(level.router) if asked.need_router else nothing(like) for level in levels]
    # No kernel writes gradients without trained experts.
    downs, ups = (
        [
            (torch.empty_like if number else torch.zeros_like)(weight) if need else nothing(like)
            for weight, number in zip(weights, trained_columns, strict=True)
        ]
        for weights, need in (
            ([level.down for level in levels], asked.need_down),
            ([level.up for level in levels], asked.need_up),
        )
    )
    zeros = [(level.trained - level.frozen) * level.rank for level in levels]
    most = max(
        (number + zero) * (asked.need_down + asked.need_up) + router
        for number, zero, router in zip(trained_columns, zeros, logit_columns, strict=True)
    )
    launch.run(
        WEIGHT_SUM,
        lambda config: launch.start(
            weight_sum_kernel,
            most,
            config,
            {
                "parts": tuple(sums),
                "grad_down": tuple(downs),
                "grad_up": tuple(ups),
                "grad_router": tuple(routers),
                "frozen_columns": variables(zeros),
                **columns,
                "slices": variables(slices),
                "dims": launch.dims,
            },
            RANK_UNIT=unit,
        ),
    )
    return list(zip(routers, downs, ups, strict=True))
