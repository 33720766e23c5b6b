"""The weights of a window's best epoch."""

import torch
from torch import Tensor

from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.state.saved_conditions import split_state


def snapshot(model: Recommender) -> dict[str, Tensor]:
    """A copy of all that a model's state dict holds, less the conditioning, which no epoch changes."""
    weights, _ = split_state(model)
    return {name: value.detach().clone() for name, value in weights.items()}


@torch.no_grad()
def restore(model: Recommender, best: dict[str, Tensor], *, counters: bool) -> None:
    """Puts a snapshot back; the utilization counters remain those of the last epoch unless `counters`."""
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


def why_last(config: StreamConfig, train_users: int, validation_users: int) -> str:
    """Why a window has no best epoch, so that its last one is kept."""
    if train_users == 0:
        return f"no user has 2 items to train on and {config.k_core} interactions in the window (k_core)"
    if validation_users == 0:
        return "the validation split has no user with 2 items"
    return f"all epochs were warm-up epochs without validation ({config.warmup_epochs})"
