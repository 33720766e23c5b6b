"""Times of training steps and of their parts, from hooks that both formulations support."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bench.core.timing import Stopwatch

PARTS = ("data", "encode", "attend", "loss", "backward", "optimizer")
"""Input of the batch; item encoder; user encoder; loss; backward; optimizer."""


class Clock:
    """Laps between marks during an epoch.

    Args:
        device: its clock is used.
        parts: laps per step.
    """

    def __init__(self, device: torch.device, parts: int = 1) -> None:
        self._device, self._parts = device, parts
        self._watch: Stopwatch | None = None

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the hooks of a new optimizer."""

    @contextmanager
    def epoch(self) -> Iterator[list[list[float]]]:
        """Yield a list that contains the seconds of each step's parts after the block."""
        steps: list[list[float]] = []
        self._watch = Stopwatch(self._device)
        try:
            yield steps
            laps = self._watch.laps()
        finally:
            self._watch = None
        if len(laps) % self._parts:
            raise RuntimeError(f"{len(laps)} laps are no whole steps of {self._parts} parts")
        steps += [list(laps[start : start + self._parts]) for start in range(0, len(laps), self._parts)]

    def mark(self, *_: object) -> None:
        """End a lap. Outside of an epoch nothing is marked, because evaluation calls the encoders too."""
        if self._watch is not None:
            self._watch.mark()


class StepClock(Clock):
    """A clock of the parts of every step.

    Args:
        model: its forward returns the loss of a step.
        items, users: its encoders. It calls each once, in this order.
        device: its clock is used.
    """

    def __init__(self, model: nn.Module, items: nn.Module, users: nn.Module, device: torch.device) -> None:
        super().__init__(device, len(PARTS))
        model.register_forward_pre_hook(self.mark)
        items.register_forward_hook(self.mark)
        users.register_forward_hook(self.mark)
        model.register_forward_hook(self.mark)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self.mark)
        optimizer.register_step_post_hook(self.mark)
