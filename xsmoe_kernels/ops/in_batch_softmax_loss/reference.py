"""The in-batch softmax loss in plain PyTorch: the specification of `in_batch_softmax_loss`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xsmoe_kernels.runtime import precision

TILE = 1 << 18
"""Logits in memory at a time, unless one query has more. They fit into a core's cache."""


class Tile(NamedTuple):
    """Some rows of the batch: queries (rows, d), targets (rows, 1), logits (rows, C), -inf for no candidate."""

    rows: slice
    queries: Tensor
    targets: Tensor
    logits: Tensor


def forward(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    rejected: Tensor,
    users: Tensor | None,
    logq: Tensor | None,
    counts: Tensor | None,
    need_queries: bool = False,
    need_items: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss (), each row's logsumexp over its candidates (M,), and the needed gradients.

    Backward needs the logsumexp if it does not receive the gradients.
    """
    wide = precision.widen(items)
    losses = wide.new_empty(queries.shape[0])
    lse = torch.empty_like(losses)
    for rows, _, target, logits in _tiles(queries, wide, targets, rejected, users, logq, counts):
        lse[rows] = logits.logsumexp(1)
        losses[rows] = lse[rows] - logits.gather(1, target).squeeze(1)
    loss = losses.sum() / max(1, len(losses))
    inputs = queries, items, targets, rejected, users, logq, counts
    return loss, lse, *backward(*inputs, lse, None, None, torch.ones_like(loss), need_queries, need_items)


def backward(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    rejected: Tensor,
    users: Tensor | None,
    logq: Tensor | None,
    counts: Tensor | None,
    lse: Tensor,
    ahead_queries: Tensor | None,
    ahead_items: Tensor | None,
    grad: Tensor,
    need_queries: bool,
    need_items: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the queries (M, d) and of the items (C, d); `grad` is that of the loss.

    Gradients that forward computed are only multiplied by it.
    """
    if ahead_queries is not None and ahead_items is not None and len(queries):
        return ahead_queries * grad, ahead_items * grad
    wide = precision.widen(items)
    grad_queries = queries.new_empty(queries.shape if need_queries else 0)
    grad_items = wide.new_zeros(wide.shape if need_items else 0)
    if not need_queries and not need_items:
        return grad_queries, grad_items.to(items.dtype)
    scale = grad / max(1, len(lse))
    # An item that is a candidate of no query has shares of 0, and 0 times its NaN would be NaN. Replacing the NaN hides
    # nothing: the shares of a query with this candidate are NaN themselves.
    finite = wide.nan_to_num(0, 0, 0) if need_queries else wide
    for rows, block, target, logits in _tiles(queries, wide, targets, rejected, users, logq, counts):
        share = (logits - lse[rows, None]).exp_()
        share.scatter_(1, target, share.gather(1, target) - 1).mul_(scale)
        if need_queries:
            grad_queries[rows] = (share @ finite).to(queries.dtype)
        if need_items:
            grad_items.addmm_(share.T, block)
    return grad_queries, grad_items.to(items.dtype)


def _tiles(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    rejected: Tensor,
    users: Tensor | None,
    logq: Tensor | None,
    counts: Tensor | None,
) -> Iterator[Tile]:
    num_queries, num_items = queries.shape[0], items.shape[0]
    step = max(1, TILE // max(1, num_items))
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        block, target = queries[rows].to(items.dtype), targets[rows, None]
        left_out = rejected[rows] if users is None else rejected[users[rows]]
        logits = block @ items.T
        if logq is not None:
            logits -= logq.to(logits.dtype)
        own = logits.gather(1, target)
        if counts is not None:
            logits += counts.to(logits.dtype).log()
            # log(0) alone is not enough: an item that is never a negative may have any logit, +inf too.
            logits.masked_fill_(counts == 0, -torch.inf)
        # Where nothing is rejected the target's logit is overwritten, and restored at once: it is a candidate, once.
        logits.scatter_(1, torch.where(left_out < 0, target, left_out), -torch.inf).scatter_(1, target, own)
        yield Tile(rows, block, target, logits)
