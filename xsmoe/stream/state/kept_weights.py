"""Weights that a window ends with: a snapshot of its best epoch, or a moving average over its epochs."""

import torch
from torch import Tensor

from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.state.saved_conditions import split_state

DECAY = 0.8
"""Weight of an epoch relative to the next one."""


def snapshot(model: Recommender) -> dict[str, Tensor]:
    """Return a copy of the model's state dict without the conditioning, which is constant during a window."""
    weights, _ = split_state(model)
    return {name: value.detach().clone() for name, value in weights.items()}


@torch.no_grad()
def restore_snapshot(model: Recommender, best: dict[str, Tensor], *, counters: bool) -> None:
    """Load a snapshot into the model. The utilization counters are restored only if `counters` is True."""
    kept = [
        (bank.utilization, bank.utilization.norm.clone(), bank.utilization.gate.clone())
        for _, _, bank in model.items.banks()
    ]
    _, conditions = split_state(model)
    model.load_state_dict({**best, **conditions})
    if not counters:
        for utilization, norm, gate in kept:
            utilization.norm.copy_(norm)
            utilization.gate.copy_(gate)


def no_best_epoch_reason(config: StreamConfig, train_users: int, validation_users: int) -> str:
    """Return why a window has no best epoch and therefore keeps its last one."""
    if train_users == 0:
        return f"no user has 2 items to train on and {config.k_core} interactions in the window (k_core)"
    if validation_users == 0:
        return "the validation split has no user with 2 items"
    return f"all epochs were warm-up epochs without validation ({config.warmup_epochs})"


@torch.no_grad()
def update_average(average: dict[str, Tensor] | None, model: Recommender, epoch: int) -> dict[str, Tensor]:
    """Add one epoch's weights to the exponential moving average, and return it.

    The average is `sum_i DECAY^(k - i) w_i / sum_i DECAY^(k - i)` over the epochs 0 to k. It needs no initial value.

    Args:
        average: average over the earlier epochs, changed in place; None at the first epoch. Tensors from a checkpoint
            are on the CPU and are moved to the model's device.
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
def load_average(model: Recommender, average: dict[str, Tensor]) -> None:
    """Copy an average into the model's parameters."""
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.copy_(average[name])
