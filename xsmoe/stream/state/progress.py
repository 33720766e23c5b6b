"""Training state of a run that checkpoints hold in addition to the model's weights."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from xsmoe.stream.epoch import load_optimizer
from xsmoe.stream.precision import LossScaler


@dataclass
class Progress:
    """Position of a run in its stream.

    Attributes:
        digests: digests of the windows so far. Training of the last one may be unfinished.
        epoch: the next epoch of the unfinished window; None between windows.
        steps: number of optimizer steps so far.
        best_epoch, best_value: best validation result of the unfinished window; None before its first validation.
        stale: number of validations since the best one.
    """

    digests: list[str]
    epoch: int | None = None
    steps: int = 0
    best_epoch: int | None = None
    best_value: float | None = None
    stale: int = 0

    @property
    def windows_done(self) -> int:
        """Number of windows whose training is finished."""
        return len(self.digests) - (self.epoch is not None)


@dataclass
class WindowState:
    """State of the window that is in training. All fields are None between windows and before the first epoch.

    Attributes:
        best: snapshot of the best epoch so far (see `snapshot`); None unless `keep` is "best".
        average: average over the epochs so far (see `update_average`); None unless `keep` is "ema".
        optimizer: state dict of the optimizer after the last epoch.
        scaler: state dict of the loss scaler; None without one.
    """

    best: dict[str, Tensor] | None = None
    average: dict[str, Tensor] | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Self:
        """Return the state in a checkpoint. Entries that an earlier version did not write become None."""
        return cls(**{field.name: checkpoint.get(field.name) for field in fields(cls)})

    def payload(self) -> dict[str, Any]:
        """Return the entries of a checkpoint, without copying tensors."""
        return dict(vars(self))

    def restore(self, optimizer: torch.optim.Optimizer, scaler: LossScaler | None) -> None:
        """Load the saved states, if there are any, into the window's optimizer and loss scaler."""
        if self.optimizer is not None:
            load_optimizer(optimizer, self.optimizer)
        if scaler is not None and self.scaler is not None:
            scaler.load_state_dict(self.scaler)

    def update(self, optimizer: torch.optim.Optimizer, scaler: LossScaler | None) -> None:
        """Store the state dicts of optimizer and scaler after an epoch."""
        self.optimizer = optimizer.state_dict()
        self.scaler = None if scaler is None else scaler.state_dict()
