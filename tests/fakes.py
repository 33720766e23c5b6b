"""What stands in for CUDA graphs on a machine without a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from xsmoe.stream.cuda import graph_capture
from xsmoe.stream.cuda.graph_capture import CannotCapture

CPU = torch.device("cpu")


class FakeCapture:
    """Captures by running a step, and replays by running it again into the place of its loss, as a graph does."""

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
    """Runs the first step that it is to capture, and fails."""

    error: Exception = CannotCapture("operation not permitted when stream is capturing")

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        step()
        raise self.error
