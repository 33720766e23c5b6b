"""Ranks among all items in plain PyTorch: the specification of `rank_of_target`."""

import torch
from torch import Tensor

from xsmoe_kernels.ops.scoring import item_scores


def forward(
    queries: Tensor, items: Tensor, targets: Tensor, seen: Tensor | None, seen_offsets: Tensor | None
) -> Tensor:
    """The rank (M,) of each query's target, as `rank_of_target` defines it."""
    ranks = targets.new_empty(targets.shape)
    for rows, scores, left_out in item_scores.tiles(queries, items, seen, seen_offsets):
        target = targets[rows, None]
        # A product of the query and its target alone may round differently, and would no longer tie with its equals.
        own = scores.gather(1, target)
        left_out.scatter_(1, target, True)
        # NaN compares as neither higher nor equal, whether it came from here or from the product.
        scores.masked_fill_(left_out, torch.nan)
        rank = 1 + (scores > own).count_nonzero(1) + ((scores == own).count_nonzero(1) + 1) // 2
        last = 1 + scores.shape[1] - left_out.count_nonzero(1)
        ranks[rows] = torch.where(own.isfinite().squeeze(1), rank, last)
    return ranks
