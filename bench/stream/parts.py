"""Where a training step's time goes, by hooks that both formulations take alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bench.measure import Stopwatch

PARTS = ("data", "encode", "attend", "loss", "backward", "optimizer")
"""Gathering the batch; item encoder; user encoder; loss; backward; optimizer."""


class StepClock:
    """Laps between the parts of every step while an epoch runs.

    Args:
        model: whose forward is the loss of a step.
        items, users: its encoders, which it calls once each, in this order.
        device: whose clock is read.
    """

    def __init__(self, model: nn.Module, items: nn.Module, users: nn.Module, device: torch.device) -> None:
        self._device = device
        self._watch: Stopwatch | None = None
        model.register_forward_pre_hook(self._mark)
        items.register_forward_hook(self._mark)
        users.register_forward_hook(self._mark)
        model.register_forward_hook(self._mark)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer of the steps to come."""
        optimizer.register_step_pre_hook(self._mark)
        optimizer.register_step_post_hook(self._mark)

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
        if len(laps) % len(PARTS):
            raise RuntimeError(f"{len(laps)} laps are no whole steps of {len(PARTS)} parts")
        steps += [list(laps[start : start + len(PARTS)]) for start in range(0, len(laps), len(PARTS))]

    def _mark(self, *_: object) -> None:
        # Evaluation calls the encoders too, outside of epochs.
        if self._watch is not None:
            self._watch.mark()
