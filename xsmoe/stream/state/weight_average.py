"""The exponential moving average of a model's weights over the epochs of a window."""

import torch
from torch import Tensor

from xsmoe.nn import Recommender

DECAY = 0.8
"""Weight of an epoch beside that of the next one."""


@torch.no_grad()
def averaged(average: dict[str, Tensor] | None, model: Recommender, epoch: int) -> dict[str, Tensor]:
    """Return the average with one epoch's weights added.

    It is `sum_i DECAY^(k - i) w_i / sum_i DECAY^(k - i)` over the epochs 0 to k, so that the first epoch needs no start
    value.

    Args:
        average: of the epochs before, changed in place; None before the first one. What a checkpoint brings lies on
            the CPU, and is moved to where the model is.
        model: its trainable parameters are averaged.
        epoch: k, from 0.
    """
    weights = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    if average is None:
        return {name: value.clone() for name, value in weights.items()}
    share = (1 - DECAY) / (1 - DECAY ** (epoch + 1))
    for name, value in weights.items():
        average[name] = average[name].to(value.device).lerp_(value, share)
    return average


@torch.no_grad()
def assign(model: Recommender, average: dict[str, Tensor]) -> None:
    """Copy an average into the model's parameters."""
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.copy_(average[name])
