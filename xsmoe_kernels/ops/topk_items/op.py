"""Items with the highest scores for each query."""

import torch
from torch import Tensor

from xsmoe_kernels.ops.scoring import item_scores
from xsmoe_kernels.ops.topk_items import reference
from xsmoe_kernels.runtime import checks, dispatch, precision, registration
from xsmoe_kernels.runtime.declaration import Input, Operator


def topk_items(queries: Tensor, items: Tensor, k: int, seen: item_scores.Seen | None) -> tuple[Tensor, Tensor]:
    """Return for each query the k items with the largest dot product that it has not seen.

    Of equal scores the lower id comes first. Items whose score is NaN or -inf are never returned. If fewer than k
    items remain, the missing places have id -1 and score -inf. Scores accumulate in float32. Autocast casts queries
    and items. Not differentiable. The (M, C) scores are never all in memory at once, unless they are few.

    Args:
        queries: (M, d), float32, bfloat16, float16 or float64; M may be 0.
        items: (C, d), of queries' dtype.
        k: the number of places per query, at least 1; may exceed C.
        seen: None, or (values, offsets): values (S,) int64 in [0, C), offsets (M+1,) int32 or int64 ascending within
            [0, S]; query m has seen `values[offsets[m]:offsets[m+1]]`.

    Returns:
        scores (M, k) float32 (float64 for float64), descending, and ids (M, k) int64.

    Raises:
        TypeError: an argument is no Tensor, of a wrong dtype, k is no int, or seen is no pair.
        ValueError: shapes that do not fit, several devices, k below 1, or seen values or offsets out of range (values
            are read on a CPU, elsewhere with XSMOE_DEBUG=1).
    """
    if not torch.compiler.is_compiling():
        item_scores.check_types(queries, items, seen)
        k = checks.integer("k", k)
    queries, items = registration.autocast(queries.detach(), items.detach())
    values, offsets = (None, None) if seen is None else seen
    scores, ids = _operator(queries, items, k, values, offsets, dispatch.requested())
    return scores, ids


def _check(queries: Tensor, items: Tensor, k: int, seen: Tensor | None, seen_offsets: Tensor | None) -> None:
    item_scores.check(queries, items, seen, seen_offsets)
    checks.integer("k", k, 1)


def _fake(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=precision.wide_dtype(queries.dtype)), queries.new_empty(
        shape, dtype=torch.int64
    )


_operator = registration.define(
    Operator(
        "topk_items",
        inputs=(
            Input("queries"),
            Input("items"),
            Input("k", "SymInt"),
            Input("seen", "Tensor?"),
            Input("seen_offsets", "Tensor?"),
        ),
        outputs=("scores", "ids"),
    ),
    reference=reference.forward,
    fake=_fake,
    check=_check,
)
