"""Device functions of the Triton kernels of a side level.

A launch processes several levels, on the grid's second axis. Their pointers, strides and sizes are tuples with one
entry per level.

The E*R columns of all experts are tiled by chunks of at most BLOCK_R columns of one expert, with several chunks in a
tile. A sum over an expert's columns in a chunk never includes another expert, for any R.
"""

import triton
import triton.language as tl

from xsmoe_kernels.triton_utils.kernel_helpers import product


@triton.jit
def activate(hidden, ACTIVATION: tl.constexpr):
    """Return the activation of float32 hidden states."""
    if ACTIVATION == "relu":
        return tl.where(hidden <= 0, 0.0, hidden)
    if ACTIVATION == "gelu_tanh":
        return hidden * tl.sigmoid(2 * _tanh_argument(hidden))
    return hidden * _normal_cdf(hidden)


@triton.jit
def activate_gradient(hidden, ACTIVATION: tl.constexpr):
    """Return the derivative of `activate`."""
    if ACTIVATION == "relu":
        return tl.where(hidden > 0, 1.0, 0.0)
    if ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(2 * _tanh_argument(hidden))
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * hidden * hidden)
        return share + 2 * hidden * share * (1 - share) * slope
    density = 0.3989422804014327 * tl.exp(-0.5 * hidden * hidden)
    return _normal_cdf(hidden) + hidden * density


@triton.jit
def _normal_cdf(value):
    return 0.5 * (1 + tl.erf(value * 0.7071067811865476))


@triton.jit
def _tanh_argument(value):
    return 0.7978845608028654 * (value + 0.044715 * value * value * value)


@triton.jit
def block_rows(block, rows, BLOCK_N: tl.constexpr):
    """Return the rows of a block, in 64 bits because they multiply strides, and which of them exist."""
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return row.to(tl.int64), row < rows


@triton.jit
def tile_count(start, frozen, experts, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the number of tiles of all experts from `start` on; no tile has both frozen and other experts."""
    chunks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    tile_chunks: tl.constexpr = BLOCK_C // BLOCK_R
    ahead = tl.maximum(frozen - start, 0)
    return tl.cdiv(ahead * chunks, tile_chunks) + tl.cdiv((experts - start - ahead) * chunks, tile_chunks)


@triton.jit
def tile_columns(tile, start, frozen, experts, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the first chunk of a tile, and the end of the experts that it may contain."""
    chunks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    tile_chunks: tl.constexpr = BLOCK_C // BLOCK_R
    ahead = tl.maximum(frozen - start, 0)
    frozen_tiles = tl.cdiv(ahead * chunks, tile_chunks)
    is_frozen = tile < frozen_tiles
    first_expert = tl.where(is_frozen, start, start + ahead)
    first_chunk = first_expert * chunks + (tile - tl.where(is_frozen, 0, frozen_tiles)) * tile_chunks
    return first_chunk, tl.where(is_frozen, frozen, experts)


@triton.jit
def chunk_columns(first_chunk, end, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return for each column of a tile its expert, its index among that expert's columns, and whether it exists."""
    chunks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    column = tl.arange(0, BLOCK_C)
    chunk = first_chunk + column // BLOCK_R
    expert = chunk // chunks
    within = (chunk % chunks) * BLOCK_R + column % BLOCK_R
    return expert, within, (expert < end) & (within < RANK)


@triton.jit
def expert_rows(frozen_weight, weight, is_frozen, expert, within, frozen, dim, RANK: tl.constexpr):
    """Return pointers to row `within` of the (R, D) matrices of experts, all frozen or all not frozen."""
    bank = tl.where(is_frozen, frozen_weight, weight)
    place = expert - tl.where(is_frozen, 0, frozen)
    return bank + (place * RANK + within).to(tl.int64) * dim


@triton.jit
def expert_factors(
    left,
    inside,
    frozen_weight,
    weight,
    frozen,
    expert,
    chunk,
    column,
    dim,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return the operands of a product over a chunk of an expert's columns: from the rows (N, E*R) that begin at
    `left`, and from the columns `column` of the expert's (R, D) matrix."""
    within = tl.arange(0, BLOCK_R)
    left_mask, right_mask = inside[:, None], (within >= 0)[:, None]
    if RANK % BLOCK_R != 0:
        exists = chunk * BLOCK_R + within < RANK
        left_mask, right_mask = left_mask & exists[None, :], exists[:, None]
    if not EVEN:
        right_mask = right_mask & (column < dim)[None, :]
    # Offsets that are equal for the whole block are added first, which needs fewer registers.
    states = tl.load(left[:, None] + (expert * RANK + chunk * BLOCK_R + within)[None, :], mask=left_mask, other=0.0)
    right = expert_rows(frozen_weight, weight, expert < frozen, expert, chunk * BLOCK_R + within, frozen, dim, RANK)
    return states, tl.load(right[:, None] + column[None, :], mask=right_mask, other=0.0)


@triton.jit
def expert_share(gate_row, inside, gated, BLOCK_N: tl.constexpr):
    """Return the sum of each row's gates except the first; it equals 1 - g_0 without cancellation."""
    share = tl.zeros((BLOCK_N,), tl.float32)
    for gate in range(1, gated):
        share += tl.load(gate_row + gate, mask=inside, other=0.0)
    return share


@triton.jit
def times_transposed(
    left,
    left_inside,
    right,
    right_inside,
    dim,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return products of rows with rows of `dim` numbers, given by pointers to their beginnings; 0 outside."""
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, dim, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        left_mask, right_mask = left_inside[:, None], right_inside[None, :]
        if not EVEN:
            left_mask, right_mask = left_mask & (place < dim)[None, :], right_mask & (place < dim)[:, None]
        rows = tl.load(left[:, None] + place[None, :], mask=left_mask, other=0.0)
        columns = tl.load(right[None, :] + place[:, None], mask=right_mask, other=0.0)
        total = product(rows, columns, total, PRECISION)
    return total


@triton.jit
def times_gates(values, gates, row, inside, first_chunk, end, experts, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return the columns of a tile, each times its row's gate for its expert."""
    chunks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    tile_chunks: tl.constexpr = values.shape[1] // BLOCK_R
    expert = (first_chunk + tl.arange(0, tile_chunks)) // chunks
    gate = tl.load(
        gates + row[:, None] * (experts + 1) + 1 + expert[None, :],
        mask=inside[:, None] & (expert < end)[None, :],
        other=0.0,
    )
    by_chunk = tl.reshape(values, (values.shape[0], tile_chunks, BLOCK_R))
    return tl.reshape(by_chunk * gate[:, :, None], values.shape)


@triton.jit
def padded(columns):
    """Return the row stride of buffers between kernels, aligned for wide loads."""
    return (columns + 15) // 16 * 16


@triton.jit
def chunk_sums(values, BLOCK_R: tl.constexpr):
    """Return the sums over each chunk of a tile's columns."""
    return tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // BLOCK_R, BLOCK_R)), axis=2)
