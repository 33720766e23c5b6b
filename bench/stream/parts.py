"""Where a training step's time goes, by hooks that both formulations take alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bench.measure import Stopwatch

PARTS = ("data", "encode", "attend", "loss", "backward", "optimizer")
"""Gathering the batch; item encoder; user encoder; loss; backward; optimizer."""


class Clock:
    """Laps between marks while an epoch runs.

    Args:
        device: whose clock is read.
        parts: laps that a step has.
    """

    def __init__(self, device: torch.device, parts: int = 1) -> None:
        self._device, self._parts = device, parts
        self._watch: Stopwatch | None = None

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer of the steps to come."""

    @contextmanager
    def epoch(self) -> Iterator[list[list[float]]]:
        """Fills the list with the seconds of each step's parts when the block is over."""
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
        """Ends a lap. Nothing outside of epochs: evaluation calls the encoders too."""
        if self._watch is not None:
            self._watch.mark()


class StepClock(Clock):
    """The parts of every step.

    Args:
        model: whose forward is the loss of a step.
        items, users: its encoders, which it calls once each, in this order.
        device: whose clock is read.
    """

    def __init__(self, model: nn.Module, items: nn.Module, users: nn.Module, device: torch.device) -> None:
        super().__init__(device, len(PARTS))
        model.register_forward_pre_hook(self.mark)
        items.register_forward_hook(self.mark)
        users.register_forward_hook(self.mark)
        model.register_forward_hook(self.mark)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self.mark)
        optimizer.register_step_post_hook(self.mark)
