"""Scores in Triton, shared by the kernels of the ranking operators.

A program processes some queries and iterates over tiles of items and, in parallel, over the sorted list of each query's
hidden items. Hidden scores become NaN inside the tile. No score is computed a second time by a product that might
round it differently, and an item that is listed twice is hidden once.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from xsmoe_kernels.triton_utils import kernel_helpers
from xsmoe_kernels.triton_utils.kernel_helpers import product
from xsmoe_kernels.triton_utils.tuning import Config, everywhere

NARROW = 2**31
"""Keys below it are sorted as 32-bit integers, in half the time."""

NOTHING = tl.constexpr(2**31 - 1)
"""The next hidden item where there is none."""
FRONT, BACK = tl.constexpr(-1), tl.constexpr(2**31 - 1)
"""Keys of entries before the first query's and after the last query's; they sort before and after all 32-bit keys."""
BACK_WIDE = tl.constexpr(2**63 - 1)


@triton.jit(do_not_specialize=["value_stride", "num_queries", "num_items", "num_values"])
def hidden_keys_kernel(
    values,
    offsets,
    targets,
    keys,
    value_stride,
    num_queries,
    num_items,
    num_values,
    TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute keys, query * num_items + item, of each query's values and of its target after them."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK).to(tl.int64)
    shift = query if TARGETS else 0
    dtype: tl.constexpr = keys.dtype.element_ty
    begin = tl.load(offsets + query).to(tl.int64)
    end = tl.load(offsets + query + 1).to(tl.int64)
    for first in range(begin, end, BLOCK):
        here = first + place
        item = tl.load(values + here * value_stride, mask=here < end, other=0)
        tl.store(keys + shift + here, (query * num_items + item).to(dtype), mask=here < end)
    if TARGETS:
        tl.store(keys + shift + end, (query * num_items + tl.load(targets + query)).to(dtype))
        shift += 1
    if query == 0:
        for first in range(0, begin, BLOCK):
            tl.store(keys + first + place, tl.full((BLOCK,), FRONT, dtype), mask=first + place < begin)
    if query == num_queries - 1:
        for first in range(end, num_values, BLOCK):
            last = tl.full((BLOCK,), BACK if dtype == tl.int32 else BACK_WIDE, dtype)
            tl.store(keys + shift + first + place, last, mask=first + place < num_values)


@triton.jit
def query_tile(queries, row, num_queries, query_stride, dim, BLOCK_K: tl.constexpr):
    """Return whole queries, which fit into a block."""
    place = tl.arange(0, BLOCK_K)
    mask = (row < num_queries)[:, None] & (place < dim)[None, :]
    return tl.load(queries + row[:, None] * query_stride + place[None, :], mask=mask, other=0.0)


@triton.jit
def score_tile(
    whole,
    queries,
    items,
    row,
    item,
    num_queries,
    num_items,
    query_stride,
    item_stride,
    dim,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the scores (BLOCK_M, BLOCK_C) of queries, already in `whole` if WHOLE, against items in any order.

    Every score is summed in the same order at every position of the tile: equal items have bitwise equal scores.
    """
    step = tl.arange(0, BLOCK_K)
    left = queries + row[:, None] * query_stride + step[None, :]
    right = items + item.to(tl.int64)[None, :] * item_stride + step[:, None]
    left_mask, right_mask = (row < num_queries)[:, None], ((item >= 0) & (item < num_items))[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if WHOLE:
        mask = right_mask if EVEN else right_mask & (step < dim)[:, None]
        total = product(whole, tl.load(right, mask=mask, other=0.0), total, PRECISION)
    else:
        for start in range(0, dim, BLOCK_K):
            if EVEN:
                left_part = tl.load(left, mask=left_mask, other=0.0)
                right_part = tl.load(right, mask=right_mask, other=0.0)
            else:
                exists = start + step < dim
                left_part = tl.load(left, mask=left_mask & exists[None, :], other=0.0)
                right_part = tl.load(right, mask=right_mask & exists[:, None], other=0.0)
            total = product(left_part, right_part, total, PRECISION)
            left += BLOCK_K
            right += BLOCK_K
    return total


@triton.jit
def hidden_item(keys, place, end, row, num_items):
    """Return the item at a position of each query's list; NOTHING after its end."""
    inside = place < end
    item = tl.load(keys + place, mask=inside, other=0).to(tl.int64) - row * num_items
    return tl.where(inside, item, NOTHING).to(tl.int32)


@triton.jit
def hidden_range(keys, offsets, row, first, num_queries, num_items, APART: tl.constexpr):
    """Return for each query the first position of its list with an item from `first` on, and the list's end.

    Lists are consecutive, each with APART more positions than the offsets say.
    """
    begin = tl.load(offsets + row, mask=row < num_queries, other=0).to(tl.int64) + row * APART
    end = tl.load(offsets + row + 1, mask=row < num_queries, other=0).to(tl.int64) + (row + 1) * APART
    end = tl.where(row < num_queries, end, begin)
    low, high = begin, end
    while tl.max(high - low, axis=0) > 0:
        middle = low + (high - low) // 2
        before = (low < high) & (hidden_item(keys, middle, high, row, num_items) < first)
        high = tl.where(before | (low >= high), high, middle)
        low = tl.where(before, middle + 1, low)
    return low, end


@triton.jit
def hide(scores, start, keys, place, item, end, row, hidden, num_items, BLOCK_C: tl.constexpr):
    """Return the scores of items from `start` on, NaN where they are hidden, and the new positions in the lists.

    `item` is the one at `place`; `hidden` counts distinct items.
    """
    # A while loop in a for loop without this branch would prevent the compiler from pipelining the loads.
    if tl.min(item, axis=0) < start + BLOCK_C:
        while tl.min(item, axis=0) < start + BLOCK_C:
            scores = tl.where(tl.arange(0, BLOCK_C)[None, :] == (item - start)[:, None], float("nan"), scores)
            place += (item < start + BLOCK_C).to(tl.int64)
            following = hidden_item(keys, place, end, row, num_items)
            hidden += (following != item).to(tl.int32)
            item = following
    return scores, place, item, hidden


def hidden_keys(
    queries: Tensor, items: Tensor, values: Tensor, offsets: Tensor, targets: Tensor | None = None
) -> Tensor:
    """Return the sorted hidden items of each query: values (S,) with offsets (M+1,), and a target for each, or none.

    Keys are query * C + item: sorting all of them keeps each query's keys in its range. Its list begins at offsets[m];
    with targets it begins at offsets[m] + m and has one more entry.
    """
    num_queries, num_items, num_values = len(queries), len(items), len(values)
    narrow = (num_queries + 1) * num_items < NARROW
    num_keys = num_values + (0 if targets is None else num_queries)
    keys = torch.empty(num_keys, dtype=torch.int32 if narrow else torch.int64, device=values.device)
    kernel_helpers.launch(
        hidden_keys_kernel,
        (num_queries,),
        queries.device,
        {
            "values": values,
            "offsets": offsets,
            "targets": values if targets is None else targets.contiguous(),
            "keys": keys,
            "value_stride": values.stride(0),
            "num_queries": num_queries,
            "num_items": num_items,
            "num_values": num_values,
        },
        {"TARGETS": targets is not None},
        Config({"BLOCK": 128}, num_warps=1),
    )
    # Targets alone are in order.
    return keys.sort().values if num_values else keys


def tiles(sizes: str, num_warps: int, num_stages: int) -> Config:
    """Return a configuration from block sizes of queries, items and the inner dimension."""
    queries, items, inner = map(int, sizes.split())
    return Config({"BLOCK_M": queries, "BLOCK_C": items, "BLOCK_K": inner}, num_warps, num_stages)


DEFAULTS = {
    ("sm_80", "half"): tiles("64 128 64", 8, 3),
    ("sm_90", "half"): tiles("128 128 64", 8, 3),
    ("sm_100", "half"): tiles("128 128 64", 8, 3),
    ("gfx942", "half"): tiles("64 128 64", 8, 2),
    ("sm_80", "tf32"): tiles("64 128 32", 8, 3),
    ("sm_90", "tf32"): tiles("128 128 32", 8, 3),
    ("sm_100", "tf32"): tiles("128 128 32", 8, 3),
    **everywhere(tiles("64 128 16", 8, 2), "ieee"),
}
INTERPRETED = tiles("16 32 16", 4, 1)
CANDIDATES = (
    tiles("64 64 64", 8, 3),
    tiles("64 128 64", 8, 3),
    tiles("64 256 64", 8, 3),
    tiles("128 128 32", 8, 4),
    tiles("64 64 32", 4, 4),
)


def fitted(config: Config, queries: Tensor, items: Tensor) -> tuple[Config, dict[str, bool]]:
    """Return the configuration and the compile-time constants for the width and the alignment of the rows.

    Rows of up to twice BLOCK_K numbers are loaded in one step, and queries once; the loads of the loop over tiles of
    items are pipelined. Wider rows are loaded in several steps, with smaller tiles because of the addresses of both
    operands. Tiles are still smaller where numbers are loaded one by one.
    """
    dim, size, blocks = queries.shape[1], queries.element_size(), dict(config.blocks)
    width, whole = max(16, triton.next_power_of_2(dim)), False
    if not kernel_helpers.rows_aligned(queries, items):
        most = {"BLOCK_M": 128 // size, "BLOCK_C": 64, "BLOCK_K": 64 // size}
        config = dataclasses.replace(config, num_warps=16 // size, num_stages=4 // size)
    elif whole := width <= 2 * blocks["BLOCK_K"]:
        blocks["BLOCK_K"], most = width, {}
    else:
        most = {"BLOCK_M": 64}
    blocks = {name: min(block, most.get(name, block)) for name, block in blocks.items()}
    return dataclasses.replace(config, blocks=blocks), {
        "WHOLE": whole,
        "EVEN": dim > 0 and dim % blocks["BLOCK_K"] == 0,
    }
