"""Sizes and helpers that the models of all end-to-end benchmarks share."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from bench.paper import model as paper

PLACES = 11
"""Items of a user: ten inputs, and the target of the last input."""
LEVELS, BLOCKS, OUT_DIM, DROPOUT = 2, 2, 128, 0.1


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set the rate of every dropout module."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def paper_model(modalities: Iterable[str], dim: int, rank: int, num_experts: int, dropout: float) -> paper.Recommender:
    """Return the paper's model; all its experts are trainable."""
    items = paper.ItemEncoder(dict.fromkeys(modalities, dim), LEVELS, rank, OUT_DIM, num_experts)
    users = paper.UserEncoder(OUT_DIM, blocks=BLOCKS, dropout=dropout, max_length=PLACES - 1)
    return paper.Recommender(items, users)


def paper_popularity(share: np.ndarray) -> Tensor:
    """Return each item's share of the interactions as the paper's model expects it: (items + 1,), 1 for padding."""
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.from_numpy(share)])
