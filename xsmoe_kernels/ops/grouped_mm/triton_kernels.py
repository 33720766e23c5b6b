"""Grouped matrix products in Triton.

Grids are large enough for any offsets, and each program computes its rows from them. Rows outside all groups have
tiles too, whose results are zeros.
"""

import triton
import triton.language as tl

from xsmoe_kernels.triton_utils.kernel_helpers import product

BOUNDS = tl.constexpr(128)
"""The number of offsets that a program compares at once."""


@triton.jit
def _tile_rows(offsets, tile, num_rows, num_experts, BLOCK_M: tl.constexpr):
    """Return a tile's first row, the end of its group, and its expert: -1 or num_experts before and after all groups.

    The group of expert e, which begins at row b, has the tiles from b // BLOCK_M + e + 1 on. These numbers ascend
    faster than groups need tiles: a few tiles stay empty, but no sum over the preceding groups is needed.
    """
    begun = 0
    for first in range(0, num_experts + 1, BOUNDS):
        expert = first + tl.arange(0, BOUNDS)
        begin = tl.load(offsets + expert, mask=expert <= num_experts, other=0).to(tl.int64)
        begun += tl.sum(((expert <= num_experts) & (begin // BLOCK_M + expert + 1 <= tile)).to(tl.int32), axis=0)
    begin = tl.load(offsets + begun - 1, mask=begun > 0, other=0).to(tl.int64)
    end = tl.load(offsets + begun, mask=begun <= num_experts, other=num_rows).to(tl.int64)
    return begin + (tile - begin // BLOCK_M - begun) * BLOCK_M, end, begun - 1


@triton.jit
def _step(stride, BLOCK: tl.constexpr):
    """Return `BLOCK * stride` in 64 bits, for a stride that may be a constant."""
    return tl.cast(stride, tl.int64) * BLOCK


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def product_kernel(
    rows,
    weight,
    offsets,
    products,
    row_stride,
    expert_stride,
    inner_stride,
    column_stride,
    num_rows,
    num_experts,
    inner,
    columns,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """products (rows, columns): rows (rows, inner) times the weight (inner, columns) of their expert, or zeros."""
    column_tiles = tl.cdiv(columns, BLOCK_P)
    first, end, expert = _tile_rows(offsets, tl.program_id(0) // column_tiles, num_rows, num_experts, BLOCK_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % column_tiles) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    step = tl.arange(0, BLOCK_K).to(tl.int64)
    left = rows + row[:, None] * row_stride + step[None, :]
    right = weight + expert.to(tl.int64) * expert_stride
    right += step[:, None] * inner_stride + column[None, :] * column_stride
    left_mask, right_mask = (row < end)[:, None], (column < columns)[None, :]
    depth = tl.where((expert >= 0) & (expert < num_experts), inner, 0)
    total = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN:
            left_tile = tl.load(left, mask=left_mask, other=0.0)
            right_tile = tl.load(right, mask=right_mask, other=0.0)
        else:
            exists = start + step < inner
            left_tile = tl.load(left, mask=left_mask & exists[None, :], other=0.0)
            right_tile = tl.load(right, mask=right_mask & exists[:, None], other=0.0)
        total = product(left_tile, right_tile, total, PRECISION)
        left += BLOCK_K
        right += _step(inner_stride, BLOCK_K)
    target = products + row[:, None] * columns + column[None, :]
    tl.store(target, total.to(products.dtype.element_ty), mask=left_mask & right_mask)


@triton.jit
def _slice_rows(rows, slices, SLICE_M: tl.constexpr):
    """Return the number of rows of a group's slice: an even share, rounded up to a multiple of SLICE_M."""
    return tl.cdiv(tl.cdiv(rows, slices), SLICE_M) * SLICE_M


@triton.jit(do_not_specialize=["slice_stride", "num_frozen", "first_expert", "slices"])
def weight_gradient_kernel(
    x,
    grad,
    offsets,
    grad_weight,
    x_stride,
    grad_stride,
    slice_stride,
    num_frozen,
    first_expert,
    slices,
    inner,
    columns,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICE_M: tl.constexpr,
):
    """grad_weight (slices, experts from first_expert on, inner, columns): x^T grad over each group's slices of rows.

    Slices beyond the end of a group are not written, except the first one.
    """
    inner_tiles, column_tiles = tl.cdiv(inner, BLOCK_K), tl.cdiv(columns, BLOCK_P)
    tile = tl.program_id(0) % (inner_tiles * column_tiles)
    part = tl.program_id(0) // (inner_tiles * column_tiles)
    index, part = (part // slices).to(tl.int64), part % slices
    begin = tl.load(offsets + first_expert + index).to(tl.int64)
    end = tl.load(offsets + first_expert + index + 1).to(tl.int64)
    end = tl.where(first_expert + index < num_frozen, begin, end)
    length = _slice_rows(end - begin, slices, SLICE_M)
    begin += part * length
    if (part > 0) & (begin >= end):
        return
    end = tl.minimum(begin + length, end)
    place = (tile // column_tiles) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    column = (tile % column_tiles) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    row = begin + tl.arange(0, BLOCK_M)
    left = x + row[None, :] * x_stride + place[:, None]
    right = grad + row[:, None] * grad_stride + column[None, :]
    left_mask, right_mask = (place < inner)[:, None], (column < columns)[None, :]
    total = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
    for start in range(begin, end, BLOCK_M):
        inside = start + tl.arange(0, BLOCK_M) < end
        left_tile = tl.load(left, mask=left_mask & inside[None, :], other=0.0)
        right_tile = tl.load(right, mask=right_mask & inside[:, None], other=0.0)
        total = product(left_tile, right_tile, total, PRECISION)
        left += _step(x_stride, BLOCK_M)
        right += _step(grad_stride, BLOCK_M)
    target = grad_weight + part.to(tl.int64) * slice_stride + index * inner * columns
    target += place[:, None] * columns + column[None, :]
    tl.store(target, total.to(grad_weight.dtype.element_ty), mask=left_mask & right_mask)


@triton.jit(do_not_specialize=["slice_stride", "num_frozen", "slices"])
def slice_sum_kernel(
    parts,
    offsets,
    grad_weight,
    slice_stride,
    num_frozen,
    slices,
    size,
    SLICE_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_weight (experts, size): for trainable ones the sum of their slices in parts, zeros for the others."""
    blocks = tl.cdiv(size, BLOCK)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    if expert >= num_frozen:
        rows = tl.load(offsets + expert + 1).to(tl.int64) - tl.load(offsets + expert).to(tl.int64)
        used = tl.cdiv(rows, tl.maximum(_slice_rows(rows, slices, SLICE_M), 1))
        source = parts + (expert - num_frozen) * size + place
        for _ in range(used):
            total += tl.load(source, mask=mask, other=0.0)
            source += slice_stride
    tl.store(grad_weight + expert * size + place, total.to(grad_weight.dtype.element_ty), mask=mask)
