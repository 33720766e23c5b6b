"""Launches of the Triton kernels of `grouped_mm`: block sizes, grids, and slices of weight gradients."""

import dataclasses
from collections.abc import Callable, Mapping

import torch
import triton
from torch import Tensor

from xsmoe_kernels.ops.grouped_mm.triton_kernels import product_kernel, slice_sum_kernel, weight_gradient_kernel
from xsmoe_kernels.triton_utils import kernel_helpers, tuning
from xsmoe_kernels.triton_utils.tuning import Config, Table, everywhere, make_config


def _of(sizes: str, num_warps: int, num_stages: int) -> Config:
    return make_config("BLOCK_M BLOCK_P BLOCK_K", sizes, num_warps, num_stages)


PRODUCT = Table(
    "grouped_mm",
    {
        ("sm_80", "half"): _of("128 128 32", 8, 4),
        ("sm_90", "half"): _of("128 128 64", 8, 3),
        ("sm_100", "half"): _of("128 128 64", 8, 3),
        ("gfx942", "half"): _of("128 128 64", 8, 2),
        ("sm_80", "tf32"): _of("128 64 32", 8, 3),
        ("sm_90", "tf32"): _of("128 128 32", 8, 3),
        ("sm_100", "tf32"): _of("128 128 32", 8, 3),
        **everywhere(_of("64 64 16", 8, 2), "ieee"),
    },
    interpreted=_of("16 32 32", 4, 1),
    candidates=(
        _of("64 128 64", 4, 4),
        _of("64 64 64", 4, 4),
        _of("128 64 64", 4, 4),
        _of("128 256 64", 8, 3),
        _of("64 64 32", 4, 3),
        _of("32 64 64", 4, 4),
    ),
)
"""Block sizes of rows, columns and the inner dimension."""

WEIGHT_GRADIENT = Table(
    "grouped_mm.weight_gradient",
    {
        ("sm_80", "half"): _of("32 128 128", 8, 4),
        ("sm_90", "half"): _of("64 128 128", 8, 3),
        ("sm_100", "half"): _of("64 128 128", 8, 3),
        ("gfx942", "half"): _of("64 128 128", 8, 2),
        ("sm_80", "tf32"): _of("32 64 128", 8, 3),
        ("sm_90", "tf32"): _of("32 128 128", 8, 3),
        ("sm_100", "tf32"): _of("32 128 128", 8, 3),
        **everywhere(_of("16 64 64", 8, 2), "ieee"),
    },
    interpreted=_of("16 32 32", 4, 1),
    candidates=(
        _of("64 64 128", 4, 4),
        _of("64 128 64", 4, 4),
        _of("64 64 64", 4, 4),
        _of("64 256 128", 8, 3),
        _of("32 64 64", 4, 3),
    ),
)
SLICE_SUM = Table(
    "grouped_mm.slice_sum",
    everywhere(Config({"BLOCK": 1024})),
    interpreted=Config({"BLOCK": 256}),
)

SLICE_BLOCKS = 8
"""The fewest blocks of rows for which a slice is worth its partial sums."""


def forward(x: Tensor, weight: Tensor, offsets: Tensor, num_frozen: int) -> Tensor:
    """Return `y[offsets[e]:offsets[e+1]] = x[offsets[e]:offsets[e+1]] @ weight[e]`, zeros in the other rows: (M, P)."""
    return _products(x, weight, offsets.contiguous())


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, num_frozen: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (M, K) and of weight (E, K, P), whose leading num_frozen experts stay zero."""
    grad, offsets = kernel_helpers.rows_in_place(grad), offsets.contiguous()
    grad_x = _products(grad, weight.mT, offsets) if need_x else x.new_empty(0)
    grad_weight = _weight_gradients(grad, x, offsets, num_frozen) if need_weight else weight.new_empty(0)
    return grad_x, grad_weight


def _products(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    rows = kernel_helpers.rows_in_place(rows)
    if 1 not in weight.stride()[1:]:
        weight = weight.contiguous()
    num_rows, (num_experts, inner, columns) = len(rows), weight.shape
    products = rows.new_empty(num_rows, columns)
    precision = kernel_helpers.precision(rows)
    aligned = kernel_helpers.rows_aligned(rows, weight if weight.stride(2) == 1 else weight.mT, products)
    most = {} if aligned else _most_unaligned(rows, BLOCK_M=64, BLOCK_K=32)

    def launch(config: Config) -> None:
        config = _fitted(config, {"BLOCK_P": columns}, most)
        block, column_block = config.blocks["BLOCK_M"], config.blocks["BLOCK_P"]
        tiles = num_rows // block + num_experts + 2
        kernel_helpers.launch(
            product_kernel,
            (tiles * triton.cdiv(columns, column_block) if num_rows else 0,),
            rows.device,
            {
                "rows": rows,
                "weight": weight,
                "offsets": offsets,
                "products": products,
                "row_stride": rows.stride(0),
                "expert_stride": weight.stride(0),
                "inner_stride": weight.stride(1),
                "column_stride": weight.stride(2),
                "num_rows": num_rows,
                "num_experts": num_experts,
                "inner": inner,
                "columns": columns,
            },
            {"EVEN": inner % config.blocks["BLOCK_K"] == 0, "PRECISION": precision},
            config,
        )

    _run(PRODUCT, rows, precision, {"inner": inner, "columns": columns}, launch, tuned=not most)
    return products


def _weight_gradients(grad: Tensor, x: Tensor, offsets: Tensor, num_frozen: int) -> Tensor:
    x = kernel_helpers.rows_in_place(x)
    (num_rows, inner), columns, num_experts = x.shape, grad.shape[1], len(offsets) - 1
    size, trainable = inner * columns, num_experts - num_frozen
    grad_weight = x.new_empty(num_experts, inner, columns)
    precision = kernel_helpers.precision(x)
    most = {} if kernel_helpers.rows_aligned(x, grad) else _most_unaligned(x, BLOCK_M=32, BLOCK_K=64)

    def launch(config: Config) -> None:
        config = _fitted(config, {"BLOCK_P": columns, "BLOCK_K": inner}, most)
        tiles = triton.cdiv(inner, config.blocks["BLOCK_K"]) * triton.cdiv(columns, config.blocks["BLOCK_P"])
        slice_rows = SLICE_BLOCKS * config.blocks["BLOCK_M"]
        slices = min(kernel_helpers.ENOUGH_PROGRAMS // max(1, trainable * tiles), triton.cdiv(num_rows, slice_rows))
        parts, first_expert = grad_weight, 0
        if slices > 1:
            parts, first_expert = grad_weight.new_empty(slices, trainable, size, dtype=torch.float32), num_frozen
        sizes = {"slice_stride": trainable * size, "num_frozen": num_frozen, "slices": max(1, slices)}
        kernel_helpers.launch(
            weight_gradient_kernel,
            ((num_experts - first_expert) * max(1, slices) * tiles,),
            x.device,
            {
                "x": x,
                "grad": grad,
                "offsets": offsets,
                "grad_weight": parts,
                "x_stride": x.stride(0),
                "grad_stride": grad.stride(0),
                "first_expert": first_expert,
                "inner": inner,
                "columns": columns,
                **sizes,
            },
            {"PRECISION": precision, "SLICE_M": slice_rows},
            config,
        )
        if slices > 1:
            sum_config = tuning.default(SLICE_SUM, x, precision)
            kernel_helpers.launch(
                slice_sum_kernel,
                (num_experts * triton.cdiv(size, sum_config.blocks["BLOCK"]),),
                x.device,
                {"parts": parts, "offsets": offsets, "grad_weight": grad_weight, "size": size, **sizes},
                {"SLICE_M": slice_rows},
                sum_config,
            )

    _run(WEIGHT_GRADIENT, x, precision, {"inner": inner, "columns": columns}, launch, tuned=not most)
    return grad_weight


def _run(
    table: Table, like: Tensor, precision: str, key: dict[str, int], launch: Callable[[Config], None], *, tuned: bool
) -> None:
    """Launch with a configuration; it is not tuned with reduced blocks, whose result would not apply to full ones."""
    if tuned:
        tuning.run(table, like, precision, key, launch)
    else:
        launch(tuning.default(table, like, precision))


def _most_unaligned(tensor: Tensor, **blocks: int) -> Mapping[str, int]:
    """Return the largest blocks for unaligned rows: numbers are loaded one by one, and addresses fill the registers."""
    return {**blocks, "BLOCK_P": 128 // tensor.element_size()}


def _fitted(config: Config, sizes: Mapping[str, int], most: Mapping[str, int]) -> Config:
    """Return the configuration with blocks no larger than the sizes need and than `most` allows."""
    blocks = {name: min(block, most.get(name, block)) for name, block in config.blocks.items()}
    blocks |= {name: min(blocks[name], max(16, triton.next_power_of_2(size))) for name, size in sizes.items()}
    num_stages = min(config.num_stages, 2) if most else config.num_stages
    return dataclasses.replace(config, blocks=blocks, num_stages=num_stages)
