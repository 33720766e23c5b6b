"""Ranks among all items in plain PyTorch: the specification of `rank_of_target`."""

import torch
from torch import Tensor

from xsmoe_kernels.ops.scoring import item_scores


def forward(
    queries: Tensor, items: Tensor, targets: Tensor, seen: Tensor | None, seen_offsets: Tensor | None
) -> Tensor:
    """Return the rank (M,) of each query's target, as `rank_of_target` defines it."""
    ranks = targets.new_empty(targets.shape)
    for rows, scores, excluded in item_scores.tiles(queries, items, seen, seen_offsets):
        target = targets[rows, None]
        # A product of the query and its target alone may round differently, and would not tie with equal items.
        own = scores.gather(1, target)
        excluded.scatter_(1, target, True)
        # NaN compares as neither higher nor equal, whether it came from here or from the product.
        scores.masked_fill_(excluded, torch.nan)
        rank = 1 + (scores > own).count_nonzero(1) + ((scores == own).count_nonzero(1) + 1) // 2
        last = 1 + scores.shape[1] - excluded.count_nonzero(1)
        ranks[rows] = torch.where(own.isfinite().squeeze(1), rank, last)
    return ranks
