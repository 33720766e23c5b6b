"""Scores of queries against a catalogue, and seen items; shared by the ranking operators."""

from collections.abc import Iterator

import torch
from torch import Tensor

from xsmoe_kernels.runtime import checks, precision

Seen = tuple[Tensor, Tensor]
"""Ragged rows of items: values (S,) int64 and offsets (M+1,); query m has seen `values[offsets[m]:offsets[m+1]]`."""

TILE = 1 << 21
"""Scores in memory at a time, unless two queries have more."""
MOST_ITEMS = 2**31 - 2**10
"""GPU kernels count items in 32 bits, up to the end of the last tile."""


def check_types(queries: Tensor, items: Tensor, seen: Seen | None) -> None:
    """Check the types of a ranking function's arguments, before it calls its operator."""
    checks.tensor("queries", queries, "M", "d")
    checks.tensor("items", items, "C", "d")
    if seen is not None:
        if not isinstance(seen, tuple | list) or len(seen) != 2:
            raise TypeError(f"seen must be None or a pair (values, offsets), not {type(seen).__name__}")
        checks.tensor("seen values", seen[0], "S")
        checks.tensor("seen offsets", seen[1], "M+1")


def check(queries: Tensor, items: Tensor, seen: Tensor | None, seen_offsets: Tensor | None) -> None:
    """Check a ranking operator's arguments, before its kernel."""
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
    """Return why a backend's GPU kernels do not support this number of items, or None if they do."""
    if len(items) <= MOST_ITEMS:
        return None
    return (
        f"items has {len(items)} rows, but the {backend} kernels support at most {MOST_ITEMS};"
        ' use_backend("reference") supports more'
    )


def tiles(
    queries: Tensor, items: Tensor, seen: Tensor | None, seen_offsets: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield for some rows at a time: the rows, their scores (rows, C), at least float32, and a mask of seen items.

    Equal items have equal scores. The caller may change both tensors.
    """
    num_queries, num_items = queries.shape[0], items.shape[0]
    columns = precision.widen(items).T
    step = max(1, TILE // max(1, num_items))
    for start in range(0, num_queries, step):
        rows = slice(start, min(start + step, num_queries))
        block = precision.widen(queries[rows])
        # A product of a matrix and a vector may sum columns in different orders, and equal items would not tie.
        # Therefore a single row is multiplied twice.
        scores = block @ columns if len(block) > 1 else (block.expand(2, -1) @ columns)[:1]
        if seen is None or seen_offsets is None:
            yield rows, scores, torch.zeros_like(scores, dtype=torch.bool)
        else:
            yield rows, scores, _seen_mask(rows, num_items, seen, seen_offsets)


def _seen_mask(rows: slice, num_items: int, values: Tensor, offsets: Tensor) -> Tensor:
    """Return a mask (rows, C). Rows are found by search, because the host does not know their number of values."""
    offsets = offsets.contiguous()
    first, last = _span(rows, values, offsets)
    values = values[first:last]
    place = torch.arange(first, last, device=offsets.device, dtype=offsets.dtype)
    row = torch.searchsorted(offsets, place, right=True) - 1 - rows.start
    num_rows = rows.stop - rows.start
    # Values of other rows are written to one place after the mask.
    index = torch.where((row >= 0) & (row < num_rows), row * num_items + values, num_rows * num_items)
    mask = torch.zeros(num_rows * num_items + 1, dtype=torch.bool, device=values.device)
    return mask.index_fill_(0, index, True)[:-1].view(num_rows, num_items)


def _span(rows: slice, values: Tensor, offsets: Tensor) -> tuple[int, int]:
    """Return the range of values to search for some rows: their own on a CPU, else all."""
    if offsets.device.type == "cpu":
        return int(offsets[rows.start]), int(offsets[rows.stop])
    return 0, values.shape[0]
