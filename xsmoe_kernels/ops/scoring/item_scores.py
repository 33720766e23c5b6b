"""Scores of queries against a catalogue and the items each query has seen: what the ranking operators share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from xsmoe_kernels.runtime import checks, precision

Seen = tuple[Tensor, Tensor]
"""Ragged rows of items: values (S,) int64 and offsets (M+1,); query m has seen `values[offsets[m]:offsets[m+1]]`."""

TILE = 1 << 21
"""Scores that exist at one time, unless two queries alone have more."""
MOST_ITEMS = 2**31 - 2**10
"""Kernels for GPUs count items in 32 bits, up to the end of the last tile."""


def check_types(queries: Tensor, items: Tensor, seen: Seen | None) -> None:
    """What a ranking function checks before it calls its operator."""
    checks.tensor("queries", queries, "M", "d")
    checks.tensor("items", items, "C", "d")
    if seen is not None:
        if not isinstance(seen, tuple | list) or len(seen) != 2:
            raise TypeError(f"seen must be None or a pair (values, offsets), not {type(seen).__name__}")
        checks.tensor("seen values", seen[0], "S")
        checks.tensor("seen offsets", seen[1], "M+1")


def check(queries: Tensor, items: Tensor, seen: Tensor | None, seen_offsets: Tensor | None) -> None:
    """What a ranking operator checks before its kernel."""
    num_queries, dim = checks.floating("queries", queries, "M", "d").shape
    num_items, _ = checks.floating("items", items, "C", dim).shape
    checks.same_dtype({"queries": queries, "items": items})
    checks.together({"queries": queries, "items": items, "seen values": seen, "seen offsets": seen_offsets})
    if seen is not None and seen_offsets is not None:
        checks.index("seen values", seen, "S")
        checks.index("seen offsets", seen_offsets, num_queries + 1, dtypes=checks.INDEX)
        if checks.values_visible(seen):
            checks.ragged("seen offsets", seen_offsets, seen.shape[0])
            checks.in_range("seen values", seen, 0, num_items)


def too_many_items(items: Tensor, backend: str) -> str | None:
    """Why a backend's kernels for GPUs cannot take so many items, or None if they can."""
    if len(items) <= MOST_ITEMS:
        return None
    return (
        f"items has {len(items)} rows, but the {backend} kernels take at most {MOST_ITEMS};"
        ' use_backend("reference") takes more'
    )


def tiles(
    queries: Tensor, items: Tensor, seen: Tensor | None, seen_offsets: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For some rows at a time: the rows, their scores (rows, C) in float32 or wider, and whether the query has seen it.

    Equal items have equal scores. Both tensors are the caller's to change.
    """
    num_queries, num_items = queries.shape[0], items.shape[0]
    columns = precision.widen(items).T
    step = max(1, TILE // max(1, num_items))
    for start in range(0, num_queries, step):
        rows = slice(start, min(start + step, num_queries))
        block = precision.widen(queries[rows])
        # A single row would become a product of matrix and vector, which may sum one column in another order than the
        # next: equal items would not tie. So it is multiplied twice.
        scores = block @ columns if len(block) > 1 else (block.expand(2, -1) @ columns)[:1]
        if seen is None or seen_offsets is None:
            yield rows, scores, torch.zeros_like(scores, dtype=torch.bool)
        else:
            yield rows, scores, _seen_mask(rows, num_items, seen, seen_offsets)


def _seen_mask(rows: slice, num_items: int, values: Tensor, offsets: Tensor) -> Tensor:
    """(rows, C) bool. Rows are found by search, since their number of values is not known to the host."""
    offsets = offsets.contiguous()
    first, last = _span(rows, values, offsets)
    values = values[first:last]
    place = torch.arange(first, last, device=offsets.device, dtype=offsets.dtype)
    row = torch.searchsorted(offsets, place, right=True) - 1 - rows.start
    num_rows = rows.stop - rows.start
    # Values of other rows go to one place behind the mask.
    index = torch.where((row >= 0) & (row < num_rows), row * num_items + values, num_rows * num_items)
    mask = torch.zeros(num_rows * num_items + 1, dtype=torch.bool, device=values.device)
    return mask.index_fill_(0, index, True)[:-1].view(num_rows, num_items)


def _span(rows: slice, values: Tensor, offsets: Tensor) -> tuple[int, int]:
    """Which values to look at for some rows: only their own where reading the offsets is free, else all."""
    if offsets.device.type == "cpu":
        return int(offsets[rows.start]), int(offsets[rows.stop])
    return 0, values.shape[0]
