"""Top-k items in Triton: scores of some queries and items, and a merge of the top k by a key of score and id.

No two items of a query have the same key, and larger keys are better. Therefore the top k of several lists are the top
k of each list's top k, for any lists in any order.
"""

import triton
import triton.language as tl

from xsmoe_kernels.ops.scoring.triton_scores import hidden_item, hidden_range, hide, query_tile, score_tile
from xsmoe_kernels.triton_utils.kernel_helpers import sortable, sorted_value

LOWEST = tl.constexpr((-(2**31) + 0x7FFFFF) << 32)
"""The key of a missing item, whose score is -inf."""
HIGHEST = tl.constexpr(2**63 - 1)
LAST_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _key(score, item):
    """Return integers in the order of scores, and for equal scores from the last id to the first."""
    return (sortable(score).to(tl.int64) << 32) + (LAST_ID - item.to(tl.int64))


@triton.jit(
    do_not_specialize=[
        "num_items",
        "first_query",
        "last_query",
        "first_item",
        "last_item",
        "slice_tiles",
        "width_tiles",
    ]
)
def score_kernel(
    queries,
    items,
    keys,
    offsets,
    scores,
    query_stride,
    item_stride,
    num_items,
    first_query,
    last_query,
    first_item,
    last_item,
    slice_tiles,
    width_tiles,
    dim,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute scores (queries, width_tiles * BLOCK_C) of the queries and items from the first to the last.

    The score of seen items and NaN become -inf. Entries after the last query, up to a multiple of BLOCK_M, and after
    the last item are undefined.
    """
    row_blocks = tl.cdiv(last_query - first_query, BLOCK_M)
    block, part = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    line = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_query + line.to(tl.int64)
    begin = first_item + part * slice_tiles * BLOCK_C
    end = min(begin + slice_tiles * BLOCK_C, last_item)
    column = tl.arange(0, BLOCK_C)
    if HIDDEN:
        place, last = hidden_range(keys, offsets, row, begin, last_query, num_items, 0)
        item = hidden_item(keys, place, last, row, num_items)
        hidden = tl.zeros((BLOCK_M,), tl.int32)
    whole = queries
    if WHOLE:
        whole = query_tile(queries, row, last_query, query_stride, dim, BLOCK_K)
    for start in range(begin, end, BLOCK_C):
        tile = score_tile(
            whole,
            queries,
            items,
            row,
            start + column,
            last_query,
            last_item,
            query_stride,
            item_stride,
            dim,
            PRECISION,
            WHOLE,
            EVEN,
            BLOCK_M,
            BLOCK_C,
            BLOCK_K,
        )
        if HIDDEN:
            tile, place, item, hidden = hide(tile, start, keys, place, item, last, row, hidden, num_items, BLOCK_C)
        tile = tl.where(tile > float("-inf"), tile, float("-inf"))
        # The workspace is small enough for 32-bit offsets.
        tl.store(scores + (line[:, None] * (width_tiles * BLOCK_C) + (start - first_item + column)[None, :]), tile)


@triton.jit(do_not_specialize=["num_rows", "first_item", "length", "slice_length", "k", "done"])
def topk_merge_kernel(
    source,
    candidates,
    scores,
    ids,
    source_stride,
    num_rows,
    first_item,
    length,
    slice_length,
    k,
    done,
    FINAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Merge the top k: candidates (rows, slices, BLOCK_K), the best keys of each slice; or if FINAL scores and ids.

    The source (rows, length) contains scores of the items from the first on, or keys. Scores that are in the first
    `done` places already are excluded. The best of the others and of the present entries fill the places from there.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_R)
    block, part = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    row = block.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    above = tl.full((BLOCK_R,), HIGHEST, tl.int64)
    if done > 0:
        score = tl.load(scores + row * k + done - 1, mask=inside, other=float("-inf"))
        above = _key(score, tl.load(ids + row * k + done - 1, mask=inside, other=-1))
    best = tl.full((BLOCK_R, BLOCK_K), LOWEST, tl.int64)
    begin = part * slice_length
    end = min(begin + slice_length, length)
    for first in range(begin, end, BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (place < end)[None, :]
        target = source + row[:, None] * source_stride + place[None, :]
        if source.dtype.element_ty == tl.int64:
            keys = tl.load(target, mask=mask, other=LOWEST)
        else:
            keys = _key(tl.load(target, mask=mask, other=float("-inf")), first_item + place[None, :])
            keys = tl.where(keys < above[:, None], keys, LOWEST)
        if tl.max((tl.max(keys, axis=1) > tl.min(best, axis=1)).to(tl.int32), axis=0) > 0:
            # One list ascends and the other descends: the larger of each pair is among the best of both.
            best = tl.bitonic_merge(tl.maximum(best, tl.topk(keys, BLOCK_K)))
    order = tl.arange(0, BLOCK_K)
    if FINAL:
        column = done + order[None, :]
        mask = inside[:, None] & (column < k)
        target = row[:, None] * k + column
        before = _key(
            tl.load(scores + target, mask=mask, other=float("-inf")), tl.load(ids + target, mask=mask, other=-1)
        )
        best = tl.bitonic_merge(tl.maximum(best, before))
        column = done + BLOCK_K - 1 - order[None, :]
        mask = inside[:, None] & (column < k)
        score = sorted_value((best >> 32).to(tl.int32))
        item = tl.where(score == float("-inf"), -1, LAST_ID - (best & 0xFFFFFFFF))
        tl.store(scores + row[:, None] * k + column, score, mask=mask)
        tl.store(ids + row[:, None] * k + column, item, mask=mask)
    else:
        slices = tl.cdiv(length, slice_length)
        target = candidates + (row * slices + part)[:, None] * BLOCK_K + order[None, :]
        tl.store(target, best, mask=inside[:, None])
