"""Forward of a side level in Triton: gates, hidden states, the mixture, and the counters.

A grid's first axis are blocks of rows (and, varying faster, of columns), its second axis levels. Programs beyond a
level's last block return at once. Sizes that grow with the stream are `variable`, so that no value compiles another
binary.
"""

import triton
import triton.language as tl

from xsmoe_kernels.ops.side_moe.triton.device_functions import (
    activate,
    block_rows,
    chunk_columns,
    expert_factors,
    expert_rows,
    expert_share,
    tile_columns,
    tile_count,
    times_gates,
    times_transposed,
)
from xsmoe_kernels.triton_utils.kernel_helpers import narrow, pick, product, variable


@triton.jit
def gate_kernel(
    x,
    router,
    gates,
    x_strides,
    rows,
    experts,
    dims,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute gates (rows, E+1) = softmax(x router^T), BLOCK_E gates at a time."""
    level = tl.program_id(1)
    row, inside = block_rows(tl.program_id(0), variable(pick(rows, level)), BLOCK_N)
    gated, dim = variable(pick(experts, level)) + 1, pick(dims, level)
    left, right = pick(x, level) + row * pick(x_strides, level), pick(router, level)
    place = pick(gates, level) + row[:, None] * gated
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    logits = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for first in range(0, gated, BLOCK_E):
        gate = first + tl.arange(0, BLOCK_E)
        columns = right + gate.to(tl.int64) * dim
        logits = times_transposed(left, inside, columns, gate < gated, dim, EVEN, PRECISION, BLOCK_N, BLOCK_E, BLOCK_K)
        logits = tl.where((gate < gated)[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        # Rows with logits of -inf only would have differences of NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        largest = larger
    for first in range(0, gated, BLOCK_E):
        gate = first + tl.arange(0, BLOCK_E)
        if gated > BLOCK_E:
            # The last block's logits are in registers. Recomputing the others costs less than storing them.
            columns = right + gate.to(tl.int64) * dim
            logits = times_transposed(
                left, inside, columns, gate < gated, dim, EVEN, PRECISION, BLOCK_N, BLOCK_E, BLOCK_K
            )
        share = tl.exp(logits - largest[:, None]) / total[:, None]
        tl.store(place + gate[None, :], share, mask=inside[:, None] & (gate < gated)[None, :])


@triton.jit
def hidden_kernel(
    x,
    frozen_down,
    down,
    gates,
    hidden,
    activated,
    x_strides,
    saves,
    rows,
    frozen,
    experts,
    dims,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute activated (rows, E*R) = activation(x down^T), times gates if GATED, and hidden = x down^T if saved."""
    level = tl.program_id(1)
    count, num_experts, dim = variable(pick(rows, level)), variable(pick(experts, level)), pick(dims, level)
    BLOCK_R: tl.constexpr = RANK_BLOCK if RANK_BLOCK < BLOCK_C else BLOCK_C
    num_frozen = variable(pick(frozen, level))
    tiles = tile_count(0, num_frozen, num_experts, RANK, BLOCK_R, BLOCK_C)
    block = tl.program_id(0) // tiles
    if block * BLOCK_N >= count:
        return
    tile = tl.program_id(0) % tiles
    first_chunk, end = tile_columns(tile, 0, num_frozen, num_experts, RANK, BLOCK_R, BLOCK_C)
    row, inside = block_rows(block, count, BLOCK_N)
    expert, within, exists = chunk_columns(first_chunk, end, RANK, BLOCK_R, BLOCK_C)
    columns = expert_rows(
        pick(frozen_down, level), pick(down, level), end <= num_frozen, expert, within, num_frozen, dim, RANK
    )
    left = pick(x, level) + row * pick(x_strides, level)
    total = times_transposed(left, inside, columns, exists, dim, EVEN, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K)
    place = row[:, None] * (num_experts * RANK) + (expert * RANK + within)[None, :]
    mask = inside[:, None] & exists[None, :]
    # Rounded before the activation, like the values that backward loads.
    rounded = narrow(total, activated[0])
    if variable(pick(saves, level)) != 0:
        tl.store(pick(hidden, level) + place, rounded, mask=mask)
    values = activate(rounded.to(tl.float32), ACTIVATION)
    if GATED:
        values = times_gates(values, pick(gates, level), row, inside, first_chunk, end, num_experts, RANK, BLOCK_R)
    tl.store(pick(activated, level) + place, narrow(values, activated[0]), mask=mask)


@triton.jit
def mixture_kernel(
    x,
    backbone,
    activated,
    frozen_up,
    up,
    gates,
    y,
    squares,
    x_strides,
    backbone_strides,
    rows,
    frozen,
    experts,
    dims,
    ONE_ROW: tl.constexpr,
    COUNT: tl.constexpr,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute y (rows, D) = g_0 backbone + (g_1 + .. + g_E) x + (g * activated) up; without the first term if ONE_ROW.

    With COUNT the gates are applied here, and squares (E+1, column blocks, rows) receive the sums of squares, over the
    columns of a block, of the backbone and of each expert's output. Without COUNT `activated` includes the gates.
    """
    level = tl.program_id(1)
    count, num_experts, dim = variable(pick(rows, level)), variable(pick(experts, level)), pick(dims, level)
    num_frozen = variable(pick(frozen, level))
    BLOCK_R: tl.constexpr = RANK_BLOCK if RANK_BLOCK < BLOCK_K else BLOCK_K
    chunks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    blocks = tl.cdiv(dim, BLOCK_D)
    block, column_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if block * BLOCK_N >= count:
        return
    row, inside = block_rows(block, count, BLOCK_N)
    column = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (column < dim)[None, :]
    rows_of_x = tl.load(pick(x, level) + row[:, None] * pick(x_strides, level) + column[None, :], mask=mask, other=0.0)
    left = pick(activated, level) + row * (num_experts * RANK)
    gate_row = pick(gates, level) + row * (num_experts + 1)
    square = pick(squares, level) + column_block.to(tl.int64) * count + row
    square_step = blocks.to(tl.int64) * count
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for step in range(num_experts * chunks):
        expert, chunk = step // chunks, step % chunks
        states, weights = expert_factors(
            left,
            inside,
            pick(frozen_up, level),
            pick(up, level),
            num_frozen,
            expert,
            chunk,
            column,
            dim,
            RANK,
            BLOCK_R,
            EVEN,
        )
        if not COUNT:
            total = product(states, weights, total, PRECISION)
        else:
            part = product(states, weights, part, PRECISION)
            if chunk == chunks - 1:
                output = rows_of_x.to(tl.float32) + part
                tl.store(square + (expert + 1) * square_step, tl.sum(output * output, axis=1), mask=inside)
                total += tl.load(gate_row + 1 + expert, mask=inside, other=0.0)[:, None] * part
                part = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    share = expert_share(gate_row, inside, num_experts + 1, BLOCK_N)
    total += share[:, None] * rows_of_x.to(tl.float32)
    if not ONE_ROW:
        states = tl.load(
            pick(backbone, level) + row[:, None] * pick(backbone_strides, level) + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        if COUNT:
            tl.store(square, tl.sum(states * states, axis=1), mask=inside)
        total += tl.load(gate_row, mask=inside, other=0.0)[:, None] * states
    tl.store(pick(y, level) + row[:, None] * dim + column[None, :], narrow(total, y[0]), mask=mask)


@triton.jit
def broadcast_kernel(
    backbone,
    mixture,
    gates,
    y,
    squares,
    backbone_strides,
    rows,
    dims,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute y = g_0 backbone + mixture, a single row; with COUNT also squares (rows,), those of the backbone."""
    level = tl.program_id(1)
    row, inside = block_rows(tl.program_id(0), variable(pick(rows, level)), BLOCK_N)
    dim, gate = pick(dims, level), tl.load(pick(gates, level))
    square = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, dim, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (column < dim)[None, :]
        states = tl.load(
            pick(backbone, level) + row[:, None] * pick(backbone_strides, level) + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        square += tl.sum(states * states, axis=1)
        total = gate * states + tl.load(pick(mixture, level) + column, mask=column < dim, other=0.0)[None, :]
        tl.store(pick(y, level) + row[:, None] * dim + column[None, :], narrow(total, y[0]), mask=mask)
    if COUNT:
        tl.store(pick(squares, level) + row, square, mask=inside)


@triton.jit
def count_kernel(
    gates,
    backbone_squares,
    expert_squares,
    row_weight,
    norms,
    masses,
    weighted,
    rows,
    experts,
    column_blocks,
    slices,
    ONE_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Compute norms and masses (slices, E+1): sums over a slice of rows of gated outputs' norms, and of the gates.

    Sums of squares are (E+1, column blocks, rows) in expert_squares. With ONE_ROW they and the gates have one row for
    all rows, but the backbone's squares are (rows,).
    """
    level = tl.program_id(1)
    gated = variable(pick(experts, level)) + 1
    part, gate = tl.program_id(0) // gated, tl.program_id(0) % gated
    if part >= variable(pick(slices, level)):
        return
    count, blocks = variable(pick(rows, level)), variable(pick(column_blocks, level))
    wide_count, wide_gate = count.to(tl.int64), gate.to(tl.int64)
    if ONE_ROW:
        own = pick(expert_squares, level) + wide_gate * blocks
        squares = tl.where(gate == 0, pick(backbone_squares, level), own)
        blocks = tl.where(gate == 0, 1, blocks)
        block_step, row_step = 1, tl.where(gate == 0, 1, 0)
    else:
        squares = pick(expert_squares, level) + wide_gate * blocks * count
        block_step, row_step = wide_count, 1
    norm = tl.zeros((BLOCK_N,), tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(part * SLICE, min(part * SLICE + SLICE, count), BLOCK_N):
        row = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = row < count
        if ONE_ROW:
            share = tl.load(pick(gates, level) + gate + row * 0, mask=inside, other=0.0)
        else:
            share = tl.load(pick(gates, level) + row * gated + gate, mask=inside, other=0.0)
        share *= tl.load(pick(row_weight, level) + row, mask=inside & (variable(pick(weighted, level)) != 0), other=1.0)
        square = tl.zeros((BLOCK_N,), tl.float32)
        for block in range(blocks):
            square += tl.load(squares + block * block_step + row * row_step, mask=inside, other=0.0)
        norm += share * tl.sqrt(square)
        mass += share
    tl.store(pick(norms, level) + part.to(tl.int64) * gated + gate, tl.sum(norm))
    tl.store(pick(masses, level) + part.to(tl.int64) * gated + gate, tl.sum(mass))
