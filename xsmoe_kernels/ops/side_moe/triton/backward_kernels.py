"""Backward of a side level in Triton; its grids are like those of the forward.

The order is: gradients of hidden states, with each expert's product with the incoming gradient; from these the
gradients of the logits, by row; then those of x; then those of the weights, as sums over slices of rows.
"""

import triton
import triton.language as tl

from xsmoe_kernels.ops.side_moe.triton.device_functions import (
    activate,
    activate_gradient,
    block_rows,
    chunk_columns,
    chunk_sums,
    expert_factors,
    expert_rows,
    expert_share,
    padded,
    tile_columns,
    tile_count,
    times_gates,
    times_transposed,
)
from xsmoe_kernels.triton_utils.kernel_helpers import narrow, pick, product, variable


@triton.jit
def column_sum_kernel(
    grad,
    backbone,
    gates,
    grad_backbone,
    grad_sums,
    dots,
    grad_strides,
    backbone_strides,
    rows,
    dims,
    slices,
    STORE_BACKBONE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Sum over a slice of rows, for a single row of x: grad_sums (slices, D), the sums of grad, and dots (slices,
    column blocks), those of grad times backbone. Also compute grad_backbone = g_0 grad."""
    level = tl.program_id(1)
    count, dim = variable(pick(rows, level)), pick(dims, level)
    blocks = tl.cdiv(dim, BLOCK_D)
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if part >= variable(pick(slices, level)):
        return
    column = block * BLOCK_D + tl.arange(0, BLOCK_D)
    gate = tl.load(pick(gates, level))
    total = tl.zeros((BLOCK_D,), tl.float32)
    dot = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(part * SLICE, min(part * SLICE + SLICE, count), BLOCK_N):
        row = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (row < count)[:, None] & (column < dim)[None, :]
        incoming = tl.load(
            pick(grad, level) + row[:, None] * pick(grad_strides, level) + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        states = tl.load(
            pick(backbone, level) + row[:, None] * pick(backbone_strides, level) + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        total += tl.sum(incoming, axis=0)
        dot += tl.sum(incoming * states, axis=0)
        if STORE_BACKBONE:
            place = pick(grad_backbone, level) + row[:, None] * dim + column[None, :]
            tl.store(place, narrow(gate * incoming, grad_backbone[0]), mask=mask)
    wide_part = part.to(tl.int64)
    tl.store(pick(grad_sums, level) + wide_part * dim + column, total, mask=column < dim)
    tl.store(pick(dots, level) + wide_part * blocks + block, tl.sum(dot))


@triton.jit
def row_sum_kernel(
    grad_sums,
    dots,
    row_grad,
    narrow_row_grad,
    backbone_dot,
    dims,
    slices,
    column_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over slices: row_grad (D,), the same rounded, and backbone_dot (1,)."""
    level = tl.program_id(1)
    dim, count = pick(dims, level), variable(pick(slices, level))
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < dim
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, count, BLOCK_N):
        part = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (part < count)[:, None] & inside[None, :]
        sums = tl.load(pick(grad_sums, level) + part[:, None] * dim + column[None, :], mask=mask, other=0.0)
        total += tl.sum(sums, axis=0)
    tl.store(pick(row_grad, level) + column, total, mask=inside)
    tl.store(pick(narrow_row_grad, level) + column, narrow(total, narrow_row_grad[0]), mask=inside)
    if tl.program_id(0) == 0:
        number = count * variable(pick(column_blocks, level))
        dot = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(0, number, BLOCK_D):
            place = first + tl.arange(0, BLOCK_D)
            dot += tl.load(pick(dots, level) + place, mask=place < number, other=0.0)
        tl.store(pick(backbone_dot, level), tl.sum(dot))


@triton.jit
def hidden_gradient_kernel(
    x,
    grad,
    frozen_down,
    down,
    frozen_up,
    up,
    gates,
    hidden,
    dots,
    grad_hidden,
    gated,
    x_strides,
    grad_strides,
    rows,
    frozen,
    experts,
    trained,
    first_wanted,
    first_stored,
    dims,
    RECOMPUTE: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    NEED_DOTS: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute for the experts from `first_wanted` on, as far as needed:

    dots (rows, E * chunks), the sums over a chunk of (grad up^T) * activation;
    grad_hidden (rows, (E - first_stored) * R), the gradient of x down^T, of the experts from `first_stored` on;
    gated (rows, (E - trained) * R), gate times activation, of the experts from `trained` on.
    """
    level = tl.program_id(1)
    count, num_experts, dim = variable(pick(rows, level)), variable(pick(experts, level)), pick(dims, level)
    num_frozen, start = variable(pick(frozen, level)), variable(pick(first_wanted, level))
    BLOCK_R: tl.constexpr = RANK_BLOCK if RANK_BLOCK < BLOCK_C else BLOCK_C
    chunks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    tile_chunks: tl.constexpr = BLOCK_C // BLOCK_R
    tiles = tile_count(start, num_frozen, num_experts, RANK, BLOCK_R, BLOCK_C)
    if tiles == 0:
        return
    block = tl.program_id(0) // tiles
    if block * BLOCK_N >= count:
        return
    tile = tl.program_id(0) % tiles
    first_chunk, end = tile_columns(tile, start, num_frozen, num_experts, RANK, BLOCK_R, BLOCK_C)
    row, inside = block_rows(block, count, BLOCK_N)
    expert, within, exists = chunk_columns(first_chunk, end, RANK, BLOCK_R, BLOCK_C)
    is_frozen = end <= num_frozen
    mask = inside[:, None] & exists[None, :]
    if RECOMPUTE:
        left = pick(x, level) + row * pick(x_strides, level)
        columns = expert_rows(
            pick(frozen_down, level), pick(down, level), is_frozen, expert, within, num_frozen, dim, RANK
        )
        total = times_transposed(left, inside, columns, exists, dim, EVEN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K)
        # Narrow, because the other product needs the registers.
        held = narrow(total, x[0])
    if NEED_GRAD:
        left = pick(grad, level) + row * pick(grad_strides, level)
        columns = expert_rows(pick(frozen_up, level), pick(up, level), is_frozen, expert, within, num_frozen, dim, RANK)
        up_grad = times_transposed(left, inside, columns, exists, dim, EVEN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K)
    if not RECOMPUTE:
        place = row[:, None] * (num_experts * RANK) + (expert * RANK + within)[None, :]
        held = tl.load(pick(hidden, level) + place, mask=mask, other=0.0)
    states = held.to(tl.float32)
    if NEED_HIDDEN:
        first = variable(pick(first_stored, level))
        value = up_grad * activate_gradient(states, ACTIVATION)
        value = times_gates(value, pick(gates, level), row, inside, first_chunk, end, num_experts, RANK, BLOCK_R)
        own = ((expert - first) * RANK + within)[None, :]
        hidden_place = pick(grad_hidden, level) + row[:, None] * ((num_experts - first) * RANK) + own
        tl.store(hidden_place, narrow(value, x[0]), mask=mask & (expert >= first)[None, :])
    if NEED_DOTS or NEED_GATED:
        values = activate(states, ACTIVATION)
    if NEED_DOTS:
        chunk = first_chunk + tl.arange(0, tile_chunks)
        place = pick(dots, level) + row[:, None] * (num_experts * chunks) + chunk[None, :]
        dot_mask = inside[:, None] & (chunk < end * chunks)[None, :]
        tl.store(place, chunk_sums(up_grad * values, BLOCK_R), mask=dot_mask)
    if NEED_GATED:
        first = variable(pick(trained, level))
        value = times_gates(values, pick(gates, level), row, inside, first_chunk, end, num_experts, RANK, BLOCK_R)
        own = ((expert - first) * RANK + within)[None, :]
        gated_place = pick(gated, level) + row[:, None] * ((num_experts - first) * RANK) + own
        tl.store(gated_place, narrow(value, x[0]), mask=mask & (expert >= first)[None, :])


@triton.jit
def logit_gradient_kernel(
    x,
    backbone,
    grad,
    gates,
    dots,
    backbone_dot,
    grad_logits,
    grad_backbone,
    x_strides,
    backbone_strides,
    grad_strides,
    rows,
    experts,
    dims,
    ONE_ROW: tl.constexpr,
    NEED_LOGITS: tl.constexpr,
    NEED_BACKBONE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute grad_logits (rows, E+1), through the softmax, and grad_backbone = g_0 grad.

    A gate's gradient is grad . backbone for the backbone, and grad . x plus the dots for an expert. With ONE_ROW, grad
    is the sum over all rows, and backbone_dot is the sum of grad . backbone.
    """
    level = tl.program_id(1)
    count, dim = variable(pick(rows, level)), pick(dims, level)
    gated = variable(pick(experts, level)) + 1
    row, inside = block_rows(tl.program_id(0), count, BLOCK_N)
    gate_row = pick(gates, level) + row * gated
    first_gate = tl.load(gate_row, mask=inside, other=0.0)
    with_x = tl.zeros((BLOCK_N,), tl.float32)
    with_backbone = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, dim, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (column < dim)[None, :]
        incoming = tl.load(
            pick(grad, level) + row[:, None] * pick(grad_strides, level) + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        if NEED_LOGITS:
            states = tl.load(
                pick(x, level) + row[:, None] * pick(x_strides, level) + column[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            with_x += tl.sum(incoming * states, axis=1)
            if not ONE_ROW:
                place = pick(backbone, level) + row[:, None] * pick(backbone_strides, level) + column[None, :]
                states = tl.load(place, mask=mask, other=0.0).to(tl.float32)
                with_backbone += tl.sum(incoming * states, axis=1)
        if NEED_BACKBONE:
            place = pick(grad_backbone, level) + row[:, None] * dim + column[None, :]
            tl.store(place, narrow(first_gate[:, None] * incoming, grad_backbone[0]), mask=mask)
    if NEED_LOGITS:
        if ONE_ROW:
            with_backbone += tl.load(pick(backbone_dot, level))
        mean = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, gated, BLOCK_E):
            gate, change = _gate_gradients(
                gate_row, pick(dots, level), row, inside, first, gated, with_x, with_backbone, CHUNKS, BLOCK_N, BLOCK_E
            )
            mean += tl.sum(gate * change, axis=1)
        for first in range(0, gated, BLOCK_E):
            gate, change = _gate_gradients(
                gate_row, pick(dots, level), row, inside, first, gated, with_x, with_backbone, CHUNKS, BLOCK_N, BLOCK_E
            )
            index = first + tl.arange(0, BLOCK_E)
            place = pick(grad_logits, level) + row[:, None] * padded(gated) + index[None, :]
            tl.store(place, gate * (change - mean[:, None]), mask=inside[:, None] & (index < gated)[None, :])


@triton.jit
def _gate_gradients(
    gate_row,
    dots,
    row,
    inside,
    first,
    gated,
    with_x,
    with_backbone,
    CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Return BLOCK_E gates of each row, and their gradients."""
    index = first + tl.arange(0, BLOCK_E)
    mask = inside[:, None] & (index < gated)[None, :]
    gate = tl.load(gate_row[:, None] + index[None, :], mask=mask, other=0.0)
    change = tl.zeros((BLOCK_N, BLOCK_E), tl.float32) + with_x[:, None]
    for chunk in tl.static_range(CHUNKS):
        place = dots + row[:, None] * ((gated - 1) * CHUNKS) + ((index - 1) * CHUNKS + chunk)[None, :]
        change += tl.load(place, mask=mask & (index > 0)[None, :], other=0.0)
    change = tl.where((index == 0)[None, :], with_backbone[:, None], change)
    return gate, tl.where(mask, change, 0.0)


@triton.jit
def row_gradient_kernel(
    grad,
    grad_hidden,
    grad_logits,
    frozen_down,
    down,
    router,
    gates,
    grad_x,
    grad_strides,
    rows,
    frozen,
    experts,
    dims,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE_PRECISION: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute grad_x (rows, D) = (g_1 + .. + g_E) grad + grad_hidden down + grad_logits router."""
    level = tl.program_id(1)
    count, num_experts, dim = variable(pick(rows, level)), variable(pick(experts, level)), pick(dims, level)
    num_frozen = variable(pick(frozen, level))
    BLOCK_R: tl.constexpr = RANK_BLOCK if RANK_BLOCK < BLOCK_K else BLOCK_K
    chunks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    gated = num_experts + 1
    blocks = tl.cdiv(dim, BLOCK_D)
    block, column_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if block * BLOCK_N >= count:
        return
    row, inside = block_rows(block, count, BLOCK_N)
    column = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (column < dim)[None, :]
    left = pick(grad_hidden, level) + row * (num_experts * RANK)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for step in range(num_experts * chunks):
        states, weights = expert_factors(
            left,
            inside,
            pick(frozen_down, level),
            pick(down, level),
            num_frozen,
            step // chunks,
            step % chunks,
            column,
            dim,
            RANK,
            BLOCK_R,
            EVEN,
        )
        total = product(states, weights, total, PRECISION)
    for first in range(0, gated, BLOCK_E):
        index = first + tl.arange(0, BLOCK_E)
        logits = tl.load(
            pick(grad_logits, level) + row[:, None] * padded(gated) + index[None, :],
            mask=inside[:, None] & (index < gated)[None, :],
            other=0.0,
        )
        weights = tl.load(
            pick(router, level) + index.to(tl.int64)[:, None] * dim + column[None, :],
            mask=(index < gated)[:, None] & (column < dim)[None, :],
            other=0.0,
        )
        total = product(logits, weights.to(tl.float32), total, WIDE_PRECISION)
    share = expert_share(pick(gates, level) + row * gated, inside, gated, BLOCK_N)
    incoming = tl.load(
        pick(grad, level) + row[:, None] * pick(grad_strides, level) + column[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    total += share[:, None] * incoming
    tl.store(pick(grad_x, level) + row[:, None] * dim + column[None, :], narrow(total, grad_x[0]), mask=mask)
