"""What a window in training holds beside the model and its progress: a checkpoint has all of it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.epoch import load_optimizer, make_optimizer
from xsmoe.stream.precision import LossScaler


@dataclass
class WindowState:
    """All None between windows, and before the first epoch of one.

    Attributes:
        best: of the best epoch so far, see `snapshot`; None unless that is what is kept.
        average: over the epochs so far, see `averaged`; None unless that is what is kept.
        optimizer: its state dict after the last epoch.
        scaler: that of the loss scaler; None without one.
    """

    best: dict[str, Tensor] | None = None
    average: dict[str, Tensor] | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Self:
        """The state that a checkpoint holds; one of an earlier version may lack some of it."""
        return cls(**{field.name: checkpoint.get(field.name) for field in fields(cls)})

    def payload(self) -> dict[str, Any]:
        """What a checkpoint holds of it; nothing is copied."""
        return dict(vars(self))

    def make_optimizer(
        self, model: Recommender, config: StreamConfig, scaler: LossScaler | None
    ) -> torch.optim.Optimizer:
        """Return the window's optimizer, after the steps so far, and give the scaler its state."""
        optimizer = make_optimizer(model, config)
        if self.optimizer is not None:
            load_optimizer(optimizer, self.optimizer)
        if scaler is not None and self.scaler is not None:
            scaler.load_state_dict(self.scaler)
        return optimizer

    def take(self, optimizer: torch.optim.Optimizer, scaler: LossScaler | None) -> None:
        """Take over the state of optimizer and scaler after an epoch."""
        self.optimizer = optimizer.state_dict()
        self.scaler = None if scaler is None else scaler.state_dict()
