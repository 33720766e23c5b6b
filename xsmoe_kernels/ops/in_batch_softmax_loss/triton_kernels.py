"""In-batch softmax loss in Triton: partial sums over tiles of logits, which stay in registers.

A query's target is not a negative. `logit_lse_kernel` computes its logit apart from the tiles, so that the loss and
the gradients of a query without negatives are exactly 0.
"""

import triton
import triton.language as tl

from xsmoe_kernels.ops.in_batch_softmax_loss.triton_device_functions import (
    correction,
    is_marked,
    lists_of,
    next_left_out,
    products,
    tile,
)
from xsmoe_kernels.triton_utils.kernel_helpers import product


@triton.jit
def _finite(value):
    """Replace infinities by 0, because exponentials of their differences would be NaN."""
    return tl.where(tl.abs(value) == float("inf"), 0.0, value)


@triton.jit(do_not_specialize=["rejected_stride", "num_queries", "num_items", "width", "slice_items"])
def sums_kernel(
    queries,
    items,
    targets,
    rejected,
    users,
    logq,
    counts,
    maxima,
    sums,
    query_stride,
    item_stride,
    rejected_stride,
    num_queries,
    num_items,
    width,
    slice_items,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute maxima and sums (slices, queries): the largest logit of the negatives in a slice of items, and the sum
    of exp(logit - largest)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = row < num_queries
    begin = tl.program_id(1) * slice_items
    target = tl.load(targets + row, mask=row_exists, other=-1).to(tl.int32)
    lists = lists_of(row, row_exists, rejected, users, rejected_stride)
    if BLOCK_K >= DIM:
        query = tile(queries, row, row_exists, query_stride, 0, DIM, BLOCK_K)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    near = begin
    for first in range(begin, min(begin + slice_items, num_items), BLOCK_C):
        words, touched, near = next_left_out(near, lists, width, target, row_exists, first, BLOCK_C)
        item = first + tl.arange(0, BLOCK_C)
        item_exists = item < num_items
        if BLOCK_K >= DIM:
            columns = tile(items, item, item_exists, item_stride, 0, DIM, BLOCK_K)
            scores = product(query, tl.trans(columns), tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION)
        else:
            query_rows = queries, row, row_exists, query_stride
            scores = products(query_rows, (items, item, item_exists, item_stride), DIM, PRECISION, BLOCK_K)
        added, drawn = correction(item, num_items, logq, counts)
        logits = tl.where(drawn[None, :], scores + added[None, :], float("-inf"))
        if touched:
            logits = tl.where(is_marked(words, tl.arange(0, BLOCK_C), 1), float("-inf"), logits)
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        base = _finite(larger)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        largest = larger
    place = tl.program_id(1).to(tl.int64) * num_queries + row
    tl.store(maxima + place, largest, mask=row_exists)
    tl.store(sums + place, total, mask=row_exists)


@triton.jit(do_not_specialize=["num_queries", "num_slices"])
def logit_lse_kernel(
    queries,
    items,
    targets,
    logq,
    maxima,
    sums,
    lse,
    losses,
    query_stride,
    item_stride,
    num_queries,
    num_slices,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute lse (queries,), the logsumexp over the target and the negatives, and losses, their sum in each block.

    Without slices lse is the target's logit, bitwise equal to the one in the losses.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < num_queries
    target = tl.load(targets + row, mask=exists, other=0)
    own = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, DIM, BLOCK_K):
        query = tile(queries, row, exists, query_stride, first, DIM, BLOCK_K).to(tl.float32)
        item = tile(items, target, exists, item_stride, first, DIM, BLOCK_K).to(tl.float32)
        own += tl.sum(query * item, axis=1)
    if logq is not None:
        own -= tl.load(logq + target, mask=exists, other=0.0).to(tl.float32)
    part = tl.arange(0, BLOCK_S).to(tl.int64)
    largest = own
    for start in range(0, num_slices, BLOCK_S):
        mask = (start + part < num_slices)[:, None] & exists[None, :]
        place = (start + part)[:, None] * num_queries + row[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(maxima + place, mask=mask, other=float("-inf")), axis=0))
    base = _finite(largest)
    total = tl.exp(own - base)
    for start in range(0, num_slices, BLOCK_S):
        mask = (start + part < num_slices)[:, None] & exists[None, :]
        place = (start + part)[:, None] * num_queries + row[None, :]
        factor = tl.exp(tl.load(maxima + place, mask=mask, other=float("-inf")) - base[None, :])
        total += tl.sum(factor * tl.load(sums + place, mask=mask, other=0.0), axis=0)
    logarithm = base + tl.log(total)
    tl.store(lse + row, logarithm, mask=exists)
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(exists, logarithm - own, 0.0), axis=0))


@triton.jit(do_not_specialize=["num_queries", "num_losses"])
def mean_kernel(losses, loss, num_queries, num_losses, BLOCK: tl.constexpr):
    """Compute loss (): the sum of the losses divided by the number of queries."""
    place = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_losses, BLOCK):
        total += tl.load(losses + first + place, mask=first + place < num_losses, other=0.0)
    tl.store(loss, tl.sum(total, axis=0) / tl.maximum(num_queries, 1))
