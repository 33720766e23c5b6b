"""Rank of one item among all items."""

import torch
from torch import Tensor

from xsmoe_kernels.ops.rank_of_target import reference
from xsmoe_kernels.ops.scoring import item_scores
from xsmoe_kernels.runtime import checks, dispatch, registration
from xsmoe_kernels.runtime.declaration import Input, Operator


def rank_of_target(queries: Tensor, items: Tensor, targets: Tensor, seen: item_scores.Seen | None) -> Tensor:
    """Rank each query's target among all items by dot product, without sorting.

    The rank is 1 + (items that score higher) + ceil((items that score equal) / 2), over the items that are neither in
    seen nor the target itself, which is excluded by index. The target's own score comes from the same product as the
    others', and it is ranked even if it is in seen. A target whose score is not finite ranks last, after all of
    those items. Another item whose score is NaN is neither higher nor equal. Scores accumulate in float32. Autocast
    casts queries and items. Not differentiable. The (M, C) scores are never all in memory at once, unless they are few.

    Args:
        queries: (M, d), float32, bfloat16, float16 or float64; M may be 0.
        items: (C, d), of queries' dtype.
        targets: (M,) int64, in [0, C).
        seen: None, or (values, offsets): values (S,) int64 in [0, C), offsets (M+1,) int32 or int64 ascending within
            [0, S]; query m has seen `values[offsets[m]:offsets[m+1]]`. An item that is listed twice is excluded once.

    Returns:
        (M,) int64, from 1 to C.

    Raises:
        TypeError: an argument is no Tensor, of a wrong dtype, or seen is no pair.
        ValueError: shapes that do not fit, several devices, or targets, seen values or offsets out of range (values
            are read on a CPU, elsewhere with XSMOE_DEBUG=1).
    """
    if not torch.compiler.is_compiling():
        item_scores.check_types(queries, items, seen)
        checks.tensor("targets", targets, "M")
    queries, items = registration.autocast(queries.detach(), items.detach())
    values, offsets = (None, None) if seen is None else seen
    ranks: Tensor = _operator(queries, items, targets, values, offsets, dispatch.requested())
    return ranks


def _check(queries: Tensor, items: Tensor, targets: Tensor, seen: Tensor | None, seen_offsets: Tensor | None) -> None:
    item_scores.check(queries, items, seen, seen_offsets)
    checks.index("targets", targets, queries.shape[0])
    if queries.shape[0] and not items.shape[0]:
        raise ValueError(
            f"items has no rows, so the {queries.shape[0]} rows of queries have no target; pass at least one item"
        )
    checks.together({"queries": queries, "targets": targets})
    if checks.values_visible(targets):
        checks.in_range("targets", targets, 0, items.shape[0])


def _fake(targets: Tensor) -> Tensor:
    return targets.new_empty(targets.shape)


_operator = registration.define(
    Operator(
        "rank_of_target",
        inputs=(
            Input("queries"),
            Input("items"),
            Input("targets"),
            Input("seen", "Tensor?"),
            Input("seen_offsets", "Tensor?"),
        ),
        outputs=("ranks",),
    ),
    reference=reference.forward,
    fake=_fake,
    check=_check,
)
