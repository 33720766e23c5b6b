"""`topk_items` in plain PyTorch: the specification."""

import torch
from torch import Tensor

from xsmoe_kernels.ops.scoring import item_scores
from xsmoe_kernels.runtime import precision


def forward(
    queries: Tensor, items: Tensor, k: int, seen: Tensor | None, seen_offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return scores and ids (M, k), as `topk_items` describes them."""
    num_queries, num_items = queries.shape[0], items.shape[0]
    best = queries.new_full((num_queries, k), -torch.inf, dtype=precision.wide_dtype(queries.dtype))
    ids = torch.full((num_queries, k), -1, device=queries.device)
    places = min(k, num_items)
    if places == 0:
        return best, ids
    position = torch.arange(num_items, device=queries.device)
    for rows, scores, hidden in item_scores.tiles(queries, items, seen, seen_offsets):
        scores.masked_fill_(hidden | scores.isnan(), -torch.inf)
        # topk breaks ties arbitrarily. A second topk over distinct keys selects every item above the k-th score, and
        # then the lowest ids with that score. It is much cheaper than a stable sort of all items.
        threshold = scores.topk(places).values[:, -1:]
        key = ((scores > threshold).long() + (scores >= threshold)) * num_items - position
        chosen = key.topk(places).indices.sort().values
        ordered, order = scores.gather(1, chosen).sort(dim=1, descending=True, stable=True)
        best[rows, :places] = ordered
        ids[rows, :places] = torch.where(ordered == -torch.inf, -1, chosen.gather(1, order))
    return best, ids
