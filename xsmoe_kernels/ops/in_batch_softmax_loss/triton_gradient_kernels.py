"""Gradients of the in-batch softmax loss in Triton: softmax shares of items, from recomputed logits."""

import triton
import triton.language as tl

from xsmoe_kernels.ops.in_batch_softmax_loss.triton_device_functions import (
    correction,
    is_marked,
    left_out,
    lists_of,
    next_left_out,
    products,
    store,
    tile,
)
from xsmoe_kernels.triton_utils.kernel_helpers import narrow, product


@triton.jit(do_not_specialize=["rejected_stride", "num_queries", "num_items", "width", "slice_items"])
def query_gradient_kernel(
    queries,
    items,
    targets,
    rejected,
    users,
    logq,
    counts,
    lse,
    own,
    grad,
    gradient,
    undefined,
    query_stride,
    item_stride,
    rejected_stride,
    num_queries,
    num_items,
    width,
    slice_items,
    CLEAN: tl.constexpr,
    SCALE: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute gradient (slices, queries, DIM): of the queries, from a slice of items.

    undefined (slices, column blocks, queries) marks where it has a NaN. The share of an item that is no query's
    candidate is 0, and 0 times its NaN is NaN. A check in every tile would cost time in all others. Instead a second
    launch, with CLEAN, replaces items that are not finite by 0 in the programs that have something undefined. This
    hides nothing: where such an item is a candidate, its share is NaN.
    """
    row = (tl.program_id(0) // tl.cdiv(DIM, BLOCK_D)) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tl.cdiv(DIM, BLOCK_D)) * BLOCK_D
    row_exists = row < num_queries
    undefined += (tl.program_id(1) * tl.cdiv(DIM, BLOCK_D) + column // BLOCK_D).to(tl.int64) * num_queries + row
    if CLEAN:  # noqa: SIM102, `and` would load in both
        if tl.max(tl.load(undefined, mask=row_exists, other=0), axis=0) == 0:
            return
    begin = tl.program_id(1) * slice_items
    target = tl.load(targets + row, mask=row_exists, other=-1).to(tl.int32)
    lists = lists_of(row, row_exists, rejected, users, rejected_stride)
    logarithm = tl.load(lse + row, mask=row_exists, other=float("inf"))
    own_share = tl.exp(tl.load(own + row, mask=row_exists, other=0.0) - logarithm) - 1
    if BLOCK_K >= DIM:
        query = tile(queries, row, row_exists, query_stride, 0, DIM, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    near = begin
    for first in range(begin, min(begin + slice_items, num_items), BLOCK_C):
        words, touched, near = next_left_out(near, lists, width, target, row_exists, first, BLOCK_C)
        item = first + tl.arange(0, BLOCK_C)
        item_exists = item < num_items
        columns = tile(items, item, item_exists, item_stride, column, DIM, BLOCK_D)
        if BLOCK_K >= DIM:
            scores = product(query, tl.trans(columns), tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION)
        else:
            query_rows = queries, row, row_exists, query_stride
            scores = products(query_rows, (items, item, item_exists, item_stride), DIM, PRECISION, BLOCK_K)
        added, drawn = correction(item, num_items, logq, counts)
        share = tl.exp(scores + added[None, :] - logarithm[:, None])
        share = tl.where(drawn[None, :], share, 0.0)
        if touched:
            share = tl.where(is_marked(words, tl.arange(0, BLOCK_C), 1), 0.0, share)
            share = tl.where(item[None, :] == target[:, None], own_share[:, None], share)
        if CLEAN:
            finite = tl.abs(columns.to(tl.float32)) < float("inf")
            columns = tl.where(finite, columns, tl.zeros_like(columns))
        total = product(narrow(share * SCALE, items), columns, total, PRECISION)
    total *= tl.load(grad).to(tl.float32) / num_queries / SCALE
    if not CLEAN:
        tl.store(undefined, tl.max((total != total).to(tl.int32), axis=1), mask=row_exists)
    store(gradient, tl.program_id(1), row, row_exists, num_queries, column, total, DIM, BLOCK_D)


@triton.jit(do_not_specialize=["rejected_stride", "num_queries", "num_items", "width", "slice_queries"])
def item_gradient_kernel(
    queries,
    items,
    targets,
    rejected,
    users,
    logq,
    counts,
    lse,
    own,
    grad,
    gradient,
    query_stride,
    item_stride,
    rejected_stride,
    num_queries,
    num_items,
    width,
    slice_queries,
    SCALE: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute gradient (slices, items, DIM): of the items, from a slice of queries."""
    first = (tl.program_id(0) // tl.cdiv(DIM, BLOCK_D)) * BLOCK_C
    column = (tl.program_id(0) % tl.cdiv(DIM, BLOCK_D)) * BLOCK_D
    place = tl.arange(0, BLOCK_C)
    item = first + place
    item_exists = item < num_items
    added, drawn = correction(item, num_items, logq, counts)
    if BLOCK_K >= DIM:
        item_tile = tile(items, item, item_exists, item_stride, 0, DIM, BLOCK_K)
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    begin = tl.program_id(1) * slice_queries
    for start in range(begin, min(begin + slice_queries, num_queries), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        row_exists = row < num_queries
        target = tl.load(targets + row, mask=row_exists, other=-1).to(tl.int32)
        lists = lists_of(row, row_exists, rejected, users, rejected_stride)
        words, _ = left_out(lists, width, target, row_exists, first, BLOCK_C)
        marks = words[0]
        for group in tl.static_range(1, len(words)):
            marks |= words[group]
        touched = tl.max((marks != 0).to(tl.int32), axis=0) > 0
        columns = tile(queries, row, row_exists, query_stride, column, DIM, BLOCK_D)
        if BLOCK_K >= DIM:
            scores = product(item_tile, tl.trans(columns), tl.zeros((BLOCK_C, BLOCK_M), tl.float32), PRECISION)
        else:
            item_rows = items, item, item_exists, item_stride
            scores = products(item_rows, (queries, row, row_exists, query_stride), DIM, PRECISION, BLOCK_K)
        logarithm = tl.load(lse + row, mask=row_exists, other=0.0)
        share = tl.where(drawn[:, None], tl.exp(scores + added[:, None] - logarithm[None, :]), 0.0)
        if touched:
            own_share = tl.exp(tl.load(own + row, mask=row_exists, other=0.0) - logarithm) - 1
            share = tl.where(is_marked(words, place, 0), 0.0, share)
            share = tl.where(item[:, None] == target[None, :], own_share[None, :], share)
        total = product(narrow(share * SCALE, queries), columns, total, PRECISION)
    total *= tl.load(grad).to(tl.float32) / num_queries / SCALE
    store(gradient, tl.program_id(1), item, item_exists, num_items, column, total, DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_rows", "num_slices"])
def slice_sum_kernel(parts, gradient, num_rows, num_slices, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Compute gradient (rows, DIM): the sum of the slices of parts (slices, rows, DIM)."""
    size = num_rows.to(tl.int64) * DIM
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_slices):
        total += tl.load(parts + part * size + place, mask=mask, other=0.0)
    tl.store(gradient + place, narrow(total, gradient), mask=mask)
