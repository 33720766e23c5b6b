"""Launches that give the gradients of side levels' weights."""

import math

import torch
from torch import Tensor
from triton import cdiv

from xsmoe_kernels.ops.side_moe.triton import configs
from xsmoe_kernels.ops.side_moe.triton import weight_kernels as kernels
from xsmoe_kernels.ops.side_moe.triton.launch import Launch, nothing, strides, variables
from xsmoe_kernels.ops.side_moe.triton.levels import BackwardLevel
from xsmoe_kernels.triton_utils import kernel_helpers
from xsmoe_kernels.triton_utils.tuning import Config


def weight_gradients(
    launch: Launch,
    parts: list[BackwardLevel],
    grads: list[Tensor],
    grad_hidden: list[Tensor],
    gated: list[Tensor],
    grad_logits: list[Tensor],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The gradients of router, down and up: sums over slices of rows, then over the slices."""
    levels, asked, like = launch.levels, parts[0], launch.like
    trained_columns = [(level.experts - level.trained) * level.rank for level in levels]
    hidden_columns = [number * asked.need_down for number in trained_columns]
    # Where x takes a gradient, the hidden states of frozen experts have theirs ahead.
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
        """The sums over slices, and how many slices there are."""
        blocks = config.blocks
        tiles = [
            sum(cdiv(number, blocks["BLOCK_C"]) for number in level_columns) * cdiv(level.dim, blocks["BLOCK_D"])
            for level, *level_columns in zip(levels, hidden_columns, gated_columns, logit_columns, strict=True)
        ]
        # By what the level itself is, so that its sums are the same in any company.
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
            kernels.weight_gradient_kernel,
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

    sums, slices = launch.run(configs.WEIGHT_GRADIENT, products)
    routers = [torch.empty_like(level.router) if asked.need_router else nothing(like) for level in levels]
    # Where nothing is trained no kernel writes.
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
        configs.WEIGHT_SUM,
        lambda config: launch.start(
            kernels.weight_sum_kernel,
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
