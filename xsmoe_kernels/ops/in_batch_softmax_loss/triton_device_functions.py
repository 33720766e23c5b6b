"""Device functions of the kernels of `in_batch_softmax_loss`: tiles of rows, and masks of the items a query excludes.

A query excludes its target and the items that it rejects. They are marked in 32-bit words, one bit for each item of a
tile. W items need W operations per query and tile. Comparing every logit with each of them needs W per logit: for the
ten items of a user, as much time as the rest of a tile. A tile without excluded items, usual among many items, costs
one comparison.
"""

import triton
import triton.language as tl

from xsmoe_kernels.triton_utils.kernel_helpers import narrow, product

AT_ONCE = tl.constexpr(4)
"""The number of a query's rejected items that are loaded together."""
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def tile(rows, row, exists, stride, first, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Return columns of rows from `first` on; zeros where there are none."""
    column = first + tl.arange(0, BLOCK)
    place = rows + row.to(tl.int64)[:, None] * stride + column[None, :]
    if DIM > 0 and DIM % BLOCK == 0:
        return tl.load(place, mask=exists[:, None], other=0.0)
    return tl.load(place, mask=exists[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def store(gradient, part, row, exists, num_rows, first, values, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Store columns of rows, from `first` on, of a part of gradient (parts, rows, DIM)."""
    column = first + tl.arange(0, BLOCK)
    place = gradient + (part.to(tl.int64) * num_rows + row)[:, None] * DIM + column[None, :]
    tl.store(place, narrow(values, gradient), mask=exists[:, None] & (column < DIM)[None, :])


@triton.jit
def products(left, right, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the products of rows with rows, each given as the first arguments of `tile`."""
    total = tl.zeros((left[1].shape[0], right[1].shape[0]), tl.float32)
    for first in range(0, DIM, BLOCK_K):
        left_tile = tile(left[0], left[1], left[2], left[3], first, DIM, BLOCK_K)
        right_tile = tile(right[0], right[1], right[2], right[3], first, DIM, BLOCK_K)
        total = product(left_tile, tl.trans(right_tile), total, PRECISION)
    return total


@triton.jit
def correction(item, num_items, logq, counts):
    """Return what is added to the products of items, and which items may be negatives."""
    drawn = item < num_items
    added = tl.zeros(item.shape, tl.float32)
    if logq is not None:
        added -= tl.load(logq + item, mask=drawn, other=0.0).to(tl.float32)
    if counts is not None:
        count = tl.load(counts + item, mask=drawn, other=0.0).to(tl.float32)
        drawn = count > 0
        added += tl.log(tl.where(drawn, count, 1.0))
    return added, drawn


@triton.jit
def lists_of(row, exists, rejected, users, rejected_stride):
    """Return pointers to the first rejected items of rows."""
    user = row.to(tl.int64)
    if users is not None:
        user = tl.load(users + row, mask=exists, other=0)
    return rejected + user * rejected_stride


@triton.jit
def _mark(words, place):
    """Return 32-bit words for each row, with the bit at the row's place set if they contain that place."""
    bit = tl.full(place.shape, 1, tl.int32) << (place & 31)
    marked = ()
    for group in tl.static_range(len(words)):
        marked += (words[group] | tl.where((place >> 5) == group, bit, 0),)
    return marked


@triton.jit
def left_out(lists, width, target, exists, first, BLOCK_C: tl.constexpr):
    """Return for each row the marks of the tile's items that it excludes, and the first excluded item after the tile.

    Rows that do not exist exclude the whole tile.
    """
    words = (tl.where(exists, 0, -1),) * (BLOCK_C // 32)
    words = _mark(words, target - first)
    later = tl.where(exists & (target >= first + BLOCK_C), target, NOWHERE)
    for start in range(0, width, AT_ONCE):
        for other in tl.static_range(AT_ONCE):
            present = exists & (start + other < width)
            item = tl.load(lists + start + other, mask=present, other=-1).to(tl.int32)
            words = _mark(words, item - first)
            later = tl.where(item >= first + BLOCK_C, tl.minimum(later, item), later)
    return words, later


@triton.jit
def is_marked(words, place, AXIS: tl.constexpr):
    """Return whether the bits at places are set, in a tile whose axis AXIS is that of the places."""
    place = tl.expand_dims(place, 1 - AXIS)
    word = tl.expand_dims(words[0], AXIS)
    for group in tl.static_range(1, len(words)):
        word = tl.where(place >= 32 * group, tl.expand_dims(words[group], AXIS), word)
    return ((word >> (place & 31)) & 1) != 0


@triton.jit
def next_left_out(near, lists, width, target, exists, first, BLOCK_C: tl.constexpr):
    """Return the marks of a tile, whether there are any, and the first excluded item after it.

    Tiles before `near`, the next such item, are skipped: among many items few tiles have one.
    """
    words = (tl.zeros(target.shape, tl.int32),) * (BLOCK_C // 32)
    touched = near < first + BLOCK_C
    if touched:
        words, later = left_out(lists, width, target, exists, first, BLOCK_C)
        near = tl.min(later, axis=0)
    return words, touched, near
