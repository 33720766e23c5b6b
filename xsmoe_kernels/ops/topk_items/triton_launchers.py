"""Launches of the Triton kernels of `topk_items`: the size of the workspace of scores, and merges of the top k.

Scores of some queries and items at a time are written to a workspace, and their top k is merged with that of the
preceding items. The number of launches depends only on sizes known on the host.
"""

import dataclasses

import torch
import triton
from torch import Tensor

from xsmoe_kernels.ops.scoring import triton_scores
from xsmoe_kernels.ops.topk_items.triton_kernels import score_kernel, topk_merge_kernel
from xsmoe_kernels.triton_utils import kernel_helpers, tuning
from xsmoe_kernels.triton_utils.tuning import Config, Table, everywhere

WORKSPACE = 1 << 24
"""Scores in memory at a time: 64 MiB."""
MOST_PLACES = 1024
"""Places that one pass over the items fills, limited by the keys of a program; more places need several passes."""
FEWEST_PLACES = 16
PROGRAMS = 2 * kernel_helpers.ENOUGH_PROGRAMS
SLICE_BLOCKS = 4
"""The fewest blocks of a list for which a slice is worth its candidates."""

SCORE = Table(
    "topk_items",
    # Scores are written to the workspace through shared memory.
    {**triton_scores.DEFAULTS, ("sm_80", "half"): triton_scores.tiles("64 128 64", 8, 2)},
    interpreted=triton_scores.INTERPRETED,
    candidates=triton_scores.CANDIDATES,
)
TOPK_MERGE = Table(
    "topk_items.merge",
    {
        **everywhere(Config({"BLOCK_R": 1, "BLOCK_N": 1024}, num_warps=8)),
        **{("sm_80", one): Config({"BLOCK_R": 1, "BLOCK_N": 2048}, num_warps=8) for one in tuning.PRECISIONS},
    },
    interpreted=Config({"BLOCK_R": 16, "BLOCK_N": 16}),
)
"""Block sizes of queries and of lists; a block has at least as many entries as there are places."""


def forward(
    queries: Tensor, items: Tensor, k: int, seen: Tensor | None, seen_offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return scores and ids (M, k), as `topk_items` describes them."""
    queries, items = kernel_helpers.rows_in_place(queries), kernel_helpers.rows_in_place(items)
    keys = offsets = None
    if seen is not None and seen_offsets is not None and len(seen):
        offsets = seen_offsets.contiguous()
        keys = triton_scores.hidden_keys(queries, items, seen, offsets)
    precision = kernel_helpers.precision(queries)

    def launch(config: Config) -> tuple[Tensor, Tensor]:
        return _top_items(queries, items, k, keys, offsets, precision, config)

    return tuning.run(SCORE, queries, precision, {"dim": queries.shape[1]}, launch)


def _top_items(
    queries: Tensor,
    items: Tensor,
    k: int,
    keys: Tensor | None,
    offsets: Tensor | None,
    precision: str,
    config: Config,
) -> tuple[Tensor, Tensor]:
    (num_queries, dim), num_items = queries.shape, len(items)
    scores = queries.new_full((num_queries, k), -torch.inf, dtype=torch.float32)
    ids = torch.full((num_queries, k), -1, device=queries.device)
    if num_queries == 0:
        return scores, ids
    config, constants = triton_scores.fitted(config, queries, items)
    block, item_block = config.blocks["BLOCK_M"], config.blocks["BLOCK_C"]
    width_tiles = min(triton.cdiv(num_items, item_block), max(1, WORKSPACE // block // item_block))
    width = width_tiles * item_block
    most = max(1, WORKSPACE // max(1, width) // block) * block
    workspace = scores.new_empty(triton.cdiv(min(num_queries, most), block) * block, width)
    for done in range(0, min(k, num_items), MOST_PLACES):
        for first_query in range(0, num_queries, most):
            last_query = min(first_query + most, num_queries)
            for first_item in range(0, num_items, width):
                last_item = min(first_item + width, num_items)
                row_blocks = triton.cdiv(last_query - first_query, block)
                tiles = triton.cdiv(last_item - first_item, item_block)
                slice_tiles = triton.cdiv(tiles, triton.cdiv(PROGRAMS, row_blocks))
                kernel_helpers.launch(
                    score_kernel,
                    (row_blocks * triton.cdiv(tiles, slice_tiles),),
                    queries.device,
                    {
                        "queries": queries,
                        "items": items,
                        "keys": ids if keys is None else keys,
                        "offsets": ids if offsets is None else offsets,
                        "scores": workspace,
                        "query_stride": queries.stride(0),
                        "item_stride": items.stride(0),
                        "num_items": num_items,
                        "first_query": first_query,
                        "last_query": last_query,
                        "first_item": first_item,
                        "last_item": last_item,
                        "slice_tiles": slice_tiles,
                        "width_tiles": width_tiles,
                        "dim": dim,
                    },
                    constants | {"PRECISION": precision, "HIDDEN": keys is not None},
                    config,
                )
                found = slice(first_query, last_query)
                _merge(workspace, first_item, last_item - first_item, scores[found], ids[found], done, num_items)
    return scores, ids


def _merge(
    source: Tensor, first_item: int, length: int, scores: Tensor, ids: Tensor, done: int, num_items: int
) -> None:
    """Merge the best of scores (rows, length) of items into the places from `done` on."""
    num_rows, k = scores.shape
    config = tuning.default(TOPK_MERGE, scores, "ieee")
    places = max(FEWEST_PLACES, triton.next_power_of_2(min(k - done, num_items - done, MOST_PLACES)))
    block = max(config.blocks["BLOCK_N"], places)
    blocks = {**config.blocks, "BLOCK_N": block, "BLOCK_K": places}
    config = dataclasses.replace(config, blocks=blocks)
    row_blocks = triton.cdiv(num_rows, config.blocks["BLOCK_R"])
    slice_length = block * max(SLICE_BLOCKS, triton.cdiv(triton.cdiv(length, block), triton.cdiv(PROGRAMS, row_blocks)))
    slices = triton.cdiv(length, slice_length)

    def launch(source: Tensor, candidates: Tensor, length: int, slice_length: int, final: bool) -> None:
        kernel_helpers.launch(
            topk_merge_kernel,
            (row_blocks * triton.cdiv(length, slice_length),),
            scores.device,
            {
                "source": source,
                "candidates": candidates,
                "scores": scores,
                "ids": ids,
                "source_stride": source.stride(0),
                "num_rows": num_rows,
                "first_item": first_item,
                "length": length,
                "slice_length": slice_length,
                "k": k,
                "done": done,
            },
            {"FINAL": final},
            config,
        )

    if slices > 1:
        candidates = ids.new_empty(num_rows, slices * places)
        launch(source, candidates, length, slice_length, False)
        source, length, slice_length = candidates, slices * places, slices * places
    launch(source, ids, length, slice_length, True)
