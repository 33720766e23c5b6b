"""Capture of a training step as a CUDA graph."""

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from xsmoe.stream.cuda.streams import lease

WARM_UP = 3
"""Number of steps before a capture, as torch recommends. One-time compilation, tuning and allocation happen in them."""
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. They are kept alive because torch may still access them."""


class CannotCapture(RuntimeError):
    """A step contains an operation that CUDA graphs do not support. The message names it."""


class Capture(Protocol):
    """Captures steps as graphs that are replayed one at a time."""

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture a step; return a function that replays it and the tensor that then holds its loss.

        Raises:
            CannotCapture: the step ran, but could not be captured.
        """
        ...

    def free(self) -> None:
        """Free the memory of all captured graphs. The caller must have dropped its references to them."""
        ...


class CudaCapture:
    """Captures steps as CUDA graphs. They are replayed one at a time and share their memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # When a graph is freed, torch also frees the cuBLAS workspace of its capture stream, which other graphs use.
        self._stream = lease(self, device)
        self._pool = torch.cuda.graph_pool_handle()

    def free(self) -> None:
        # torch does not accept a pool handle whose graphs are all freed, and keeps their memory until `empty_cache`.
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        torch.cuda.empty_cache()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run the step `WARM_UP` times, then capture it; see `Capture`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    step()
        finally:
            # Needed after an error too: the caller then restores the tensors that these steps wrote.
            current.wait_stream(self._stream)
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        generator = torch.cuda.default_generators[index]
        spare, graph = generator.clone_state(), torch.cuda.CUDAGraph()
        try:
            # A failed capture leaves its own stream as the current one. Copies in other threads may continue.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                loss = step()
        except torch.OutOfMemoryError:
            # This capture ends normally. Resetting the graph returns its part of the pool.
            graph.reset()
            raise
        except RuntimeError as error:
            # The generator and the allocators still expect the capture to continue, and the allocators access the
            # graph. Up to torch 2.13 an unfinished graph keeps its part of the pool, so a run does not try again.
            _failed.append(graph)
            generator.graphsafe_set_state(spare)
            with suppress(RuntimeError):  # raised if the capture has ended
                torch._C._cuda_endAllocateToPool(index, self._pool)
            graph.reset()
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise CannotCapture(str(cause).partition("\n")[0]) from error
        return graph.replay, loss
