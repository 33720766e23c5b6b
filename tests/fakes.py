"""Fakes of CUDA graph capture for machines without a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from xsmoe.stream.cuda import graph_capture
from xsmoe.stream.cuda.graph_capture import CannotCapture

CPU = torch.device("cpu")


class FakeCapture:
    """Captures a step by running it. Replays it by running it again and copying its loss, like a graph."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.captures = self.freed = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        for _ in range(graph_capture.WARM_UP):
            step()
        loss = step()

        def replay() -> None:
            loss.copy_(step())

        return replay, loss

    def free(self) -> None:
        self.freed += 1


class FailingCapture(FakeCapture):
    """Runs the first step of a capture, then fails."""

    error: Exception = CannotCapture("operation not permitted when stream is capturing")

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        step()
        raise self.error
