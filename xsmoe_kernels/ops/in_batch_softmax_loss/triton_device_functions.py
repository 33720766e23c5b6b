"""What the Triton kernels of `in_batch_softmax_loss` share: tiles of rows, and which items a query leaves out.

What a query leaves out, its target and what it rejects, is marked in words, a bit for each item of a tile. W items take
W operations per query and tile, where comparing every logit with each of them takes W per logit: for the ten items of a
user as much time as all else in a tile. Where whole tiles are left out by nobody, as among many items, they are passed
over by one comparison.
"""

import triton
import triton.language as tl

from xsmoe_kernels.triton_utils.kernel_helpers import narrow, product

AT_ONCE = tl.constexpr(4)
"""Rejected items of a query that are on their way from memory together."""
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def tile(rows, row, exists, stride, first, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of rows from `first` on; zeros where there are none."""
    column = first + tl.arange(0, BLOCK)
    place = rows + row.to(tl.int64)[:, None] * stride + column[None, :]
    if DIM > 0 and DIM % BLOCK == 0:
        return tl.load(place, mask=exists[:, None], other=0.0)
    return tl.load(place, mask=exists[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def store(gradient, part, row, exists, num_rows, first, values, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of rows, from `first` on, of a part of gradient (parts, rows, DIM)."""
    column = first + tl.arange(0, BLOCK)
    place = gradient + (part.to(tl.int64) * num_rows + row)[:, None] * DIM + column[None, :]
    tl.store(place, narrow(values, gradient), mask=exists[:, None] & (column < DIM)[None, :])


@triton.jit
def products(left, right, DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """The products of rows with rows, each given as the arguments that `tile` begins with."""
    total = tl.zeros((left[1].shape[0], right[1].shape[0]), tl.float32)
    for first in range(0, DIM, BLOCK_K):
        left_tile = tile(left[0], left[1], left[2], left[3], first, DIM, BLOCK_K)
        right_tile = tile(right[0], right[1], right[2], right[3], first, DIM, BLOCK_K)
        total = product(left_tile, tl.trans(right_tile), total, PRECISION)
    return total


@triton.jit
def correction(item, num_items, logq, counts):
    """What is added to the products of items, and which of them may be negatives."""
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
    """Where the rejected items of rows begin."""
    user = row.to(tl.int64)
    if users is not None:
        user = tl.load(users + row, mask=exists, other=0)
    return rejected + user * rejected_stride


@triton.jit
def _mark(words, place):
    """Words of 32 bits for each row, with the bit at the row's place set, if that lies in them."""
    bit = tl.full(place.shape, 1, tl.int32) << (place & 31)
    marked = ()
    for group in tl.static_range(len(words)):
        marked += (words[group] | tl.where((place >> 5) == group, bit, 0),)
    return marked


@triton.jit
def left_out(lists, width, target, exists, first, BLOCK_C: tl.constexpr):
    """For each row the marks of what it leaves out of a tile of items, and the first item after the tile that it does.

    Rows that do not exist leave out all of the tile.
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
    """Whether the bits at places are set, in a tile whose axis AXIS is that of the places."""
    place = tl.expand_dims(place, 1 - AXIS)
    word = tl.expand_dims(words[0], AXIS)
    for group in tl.static_range(1, len(words)):
        word = tl.where(place >= 32 * group, tl.expand_dims(words[group], AXIS), word)
    return ((word >> (place & 31)) & 1) != 0


@triton.jit
def next_left_out(near, lists, width, target, exists, first, BLOCK_C: tl.constexpr):
    """The marks of a tile and whether there are any, and the first item after it that a row leaves out.

    Tiles before `near`, the last such item, are not looked through: of many items few tiles have one.
    """
    words = (tl.zeros(target.shape, tl.int32),) * (BLOCK_C // 32)
    touched = near < first + BLOCK_C
    if touched:
        words, later = left_out(lists, width, target, exists, first, BLOCK_C)
        near = tl.min(later, axis=0)
    return words, touched, near
