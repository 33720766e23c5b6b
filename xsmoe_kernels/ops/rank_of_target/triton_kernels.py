"""Ranks among all items in Triton.

With p = #higher + #(higher or equal), 1 + #higher + ceil(#equal / 2) is 1 + ceil(p / 2): one count is enough.
Items are divided into slices if queries alone would not fill a GPU. `rank_kernel` sums the counts of the slices.
"""

import triton
import triton.language as tl
from torch import Tensor

from xsmoe_kernels.ops.scoring import triton_scores
from xsmoe_kernels.ops.scoring.triton_scores import hidden_item, hidden_range, hide, query_tile, score_tile
from xsmoe_kernels.triton_utils import kernel_helpers, tuning
from xsmoe_kernels.triton_utils.tuning import Config, Table, everywhere

PROGRAMS = 2 * kernel_helpers.ENOUGH_PROGRAMS
FEWEST_TILES = 4
"""The fewest tiles of a slice. Its targets' scores are one more tile, which should not be most of the work."""


@triton.jit(do_not_specialize=["num_queries", "num_items", "slice_tiles"])
def count_kernel(
    queries,
    items,
    targets,
    keys,
    offsets,
    points,
    query_stride,
    item_stride,
    num_queries,
    num_items,
    slice_tiles,
    dim,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute points (slices, queries): the number of a slice's items that score higher than the target, plus no lower.

    The targets of the queries are the first tile. It is computed in the same loop as all items, so that an item equal
    to a target has the same score, however the product is compiled. The target and the seen items are hidden.
    """
    tl.static_assert(BLOCK_M <= BLOCK_C)
    row_blocks = tl.cdiv(num_queries, BLOCK_M)
    block, part = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = part * slice_tiles * BLOCK_C
    end = min(begin + slice_tiles * BLOCK_C, num_items)
    other = tl.arange(0, BLOCK_C)
    of_block = (other < BLOCK_M) & (block * BLOCK_M + other < num_queries)
    target = tl.load(targets + block.to(tl.int64) * BLOCK_M + other, mask=of_block, other=-1)
    place, last = hidden_range(keys, offsets, row, begin, num_queries, num_items, 1)
    item = hidden_item(keys, place, last, row, num_items)
    hidden = tl.zeros((BLOCK_M,), tl.int32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.int64)
    whole = queries
    if WHOLE:
        whole = query_tile(queries, row, num_queries, query_stride, dim, BLOCK_K)
    for start in range(begin - BLOCK_C, end, BLOCK_C):
        scores = score_tile(
            whole,
            queries,
            items,
            row,
            tl.where(start < begin, target, (start + other).to(tl.int64)),
            num_queries,
            num_items,
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
        if start < begin:
            diagonal = tl.arange(0, BLOCK_M)[:, None] == other[None, :]
            own = tl.sum(tl.where(diagonal, scores, 0.0), axis=1)
        else:
            if start + BLOCK_C > end:
                scores = tl.where((start + other < end)[None, :], scores, float("nan"))
            scores, place, item, hidden = hide(scores, start, keys, place, item, last, row, hidden, num_items, BLOCK_C)
            higher, no_lower = scores > own[:, None], scores >= own[:, None]
            total += tl.sum(higher.to(tl.int32) + no_lower.to(tl.int32), axis=1)
    # All items that are not hidden rank above a target whose score is not finite.
    total = tl.where(tl.abs(own) < float("inf"), total, 2 * (end - begin - hidden).to(tl.int64))
    tl.store(points + part.to(tl.int64) * num_queries + row, total, mask=row < num_queries)


@triton.jit(do_not_specialize=["num_queries", "slices"])
def rank_kernel(points, ranks, num_queries, slices, BLOCK: tl.constexpr):
    """Compute ranks (queries,) from the points of all slices."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for _ in range(slices):
        total += tl.load(points + row, mask=row < num_queries, other=0)
        points += num_queries
    tl.store(ranks + row, 1 + (total + 1) // 2, mask=row < num_queries)


COUNT = Table(
    "rank_of_target",
    triton_scores.DEFAULTS,
    interpreted=triton_scores.INTERPRETED,
    candidates=triton_scores.CANDIDATES,
)
RANK = Table("rank_of_target.rank", everywhere(Config({"BLOCK": 128})), interpreted=Config({"BLOCK": 16}))


def forward(
    queries: Tensor, items: Tensor, targets: Tensor, seen: Tensor | None, seen_offsets: Tensor | None
) -> Tensor:
    """Return the rank (M,) of each query's target, as `rank_of_target` defines it."""
    (num_queries, dim), num_items = queries.shape, len(items)
    ranks = targets.new_empty(num_queries)
    if num_queries == 0:
        return ranks
    queries, items = kernel_helpers.rows_in_place(queries), kernel_helpers.rows_in_place(items)
    targets = targets.contiguous()
    if seen is None or seen_offsets is None:
        seen, seen_offsets = targets.new_empty(0), targets.new_zeros(num_queries + 1)
    seen_offsets = seen_offsets.contiguous()
    keys = triton_scores.hidden_keys(queries, items, seen, seen_offsets, targets)
    precision = kernel_helpers.precision(queries)

    def launch(config: Config) -> None:
        config, constants = triton_scores.fitted(config, queries, items)
        row_blocks = triton.cdiv(num_queries, config.blocks["BLOCK_M"])
        tiles = triton.cdiv(num_items, config.blocks["BLOCK_C"])
        slice_tiles = max(FEWEST_TILES, triton.cdiv(tiles, triton.cdiv(PROGRAMS, row_blocks)))
        slices = triton.cdiv(tiles, slice_tiles)
        points = targets.new_empty(slices, num_queries)
        kernel_helpers.launch(
            count_kernel,
            (row_blocks * slices,),
            queries.device,
            {
                "queries": queries,
                "items": items,
                "targets": targets,
                "keys": keys,
                "offsets": seen_offsets,
                "points": points,
                "query_stride": queries.stride(0),
                "item_stride": items.stride(0),
                "num_queries": num_queries,
                "num_items": num_items,
                "slice_tiles": slice_tiles,
                "dim": dim,
            },
            constants | {"PRECISION": precision},
            config,
        )
        rank_config = tuning.default(RANK, queries, precision)
        kernel_helpers.launch(
            rank_kernel,
            (triton.cdiv(num_queries, rank_config.blocks["BLOCK"]),),
            queries.device,
            {"points": points, "ranks": ranks, "num_queries": num_queries, "slices": slices},
            {},
            rank_config,
        )

    tuning.run(COUNT, queries, precision, {"dim": dim}, launch)
    return ranks
