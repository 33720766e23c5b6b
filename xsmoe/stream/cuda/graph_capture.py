"""Capturing a step as a CUDA graph."""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from xsmoe.stream.cuda.streams import lease

WARM_UP = 3
"""Steps ahead of a capture, as torch advises: what is compiled, tuned or made at the first call must not go into it."""
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed, held because torch may go on asking them."""


class CannotCapture(RuntimeError):
    """A step does what no CUDA graph can hold; the message says what."""


class Capture(Protocol):
    """Makes graphs that replay one at a time."""

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """From a step to what replays it, and where its loss lies then.

        Raises:
            CannotCapture: the step ran, and could not be captured.
        """
        ...

    def forget(self) -> None:
        """Gives back the memory of all graphs so far, none of which is held any more."""
        ...


class CudaCapture:
    """Captures steps that replay one at a time, and so share their memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # With a graph torch frees what cuBLAS works in on the stream that it was captured on, for all other graphs too.
        self._stream = lease(self, device)
        self._pool = torch.cuda.graph_pool_handle()

    def forget(self) -> None:
        # torch takes no handle again whose graphs are all gone, and keeps their memory until it is asked.
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        torch.cuda.empty_cache()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Runs the step a few times, then captures it; see `Capture`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    step()
        finally:
            # What goes on after an error as well: it puts back what these steps write.
            current.wait_stream(self._stream)
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        generator = torch.cuda.default_generators[index]
        spare, graph = generator.clone_state(), torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves its own stream behind as the current one. Other threads may go on with copies.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                loss = step()
        except torch.OutOfMemoryError:
            # Such a capture ends as others do, and what it has of the pool comes back with its graph.
            graph.reset()
            raise
        except RuntimeError as error:
            # It also leaves generator and allocators in the belief that it goes on, and the latter ask the graph. Up to
            # torch 2.13 one that did not end keeps its part of the pool, which is why a run tries no second time.
            _failed.append(graph)
            generator.graphsafe_set_state(spare)
            with suppress(RuntimeError):  # it has ended
                torch._C._cuda_endAllocateToPool(index, self._pool)
            graph.reset()
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise CannotCapture(str(cause).partition("\n")[0]) from error
        return graph.replay, loss
