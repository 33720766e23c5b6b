"""Prefetch of step inputs. On CUDA they are built, pinned and copied while earlier steps run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from xsmoe.stream.cuda.streams import stream_for

AHEAD = 2
"""Number of inputs that are prepared before their step starts, on CUDA."""
IN_FLIGHT = 2
"""Number of steps that the host may be ahead of the GPU. The inputs of these steps stay allocated."""


class Movable(Protocol):
    """A group of tensors that is copied to a device together."""

    def pin(self) -> Self:
        """Return a copy in pinned memory."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        ...


class HiddenStates(dict[str, list[Tensor]]):
    """Hidden states of some items by modality: for each level (N, D), or (1, D) if the items share the row."""

    def map_levels(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every level."""
        return type(self)({name: [function(level) for level in levels] for name, levels in self.items()})

    def pin(self) -> Self:
        """Return a copy in pinned memory, from which copies to a GPU are asynchronous."""
        # Levels may be slices of one tensor. Pinning a slice would pin the whole tensor.
        return self.map_levels(lambda level: level.contiguous().pin_memory())

    def to(self, device: torch.device) -> Self:
        """Return a copy on another device. Copies from pinned memory are asynchronous."""
        return self.map_levels(lambda level: level.to(device, non_blocking=True))

    def tensors(self) -> list[Tensor]:
        """Return all levels."""
        return [level for levels in self.values() for level in levels]


S = TypeVar("S")
T = TypeVar("T")
M = TypeVar("M", bound=Movable)


class PendingCopy(NamedTuple, Generic[M]):
    """An input whose copy to the device has started, and the event that marks the end of the copy."""

    value: M
    done: torch.cuda.Event


class CopyStream:
    """A separate CUDA stream for copies to a GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = stream_for("copies", device)
        self._received: deque[torch.cuda.Event] = deque()

    def send(self, value: M) -> PendingCopy[M]:
        """Start the copy of an input. Call from one thread only; it blocks while the GPU is too far behind."""
        if len(self._received) >= IN_FLIGHT:
            self._received.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            moved = value.pin().to(self._device)
            return PendingCopy(moved, self._stream.record_event())

    def receive(self, sent: PendingCopy[M]) -> M:
        """Make the current stream wait for an input and return the input. The host does not wait."""
        current = torch.cuda.current_stream(self._device)
        self._received.append(current.record_event())
        current.wait_event(sent.done)
        for tensor in sent.value.tensors():
            # The tensor was allocated on the copy stream. Its memory must not be reused before the step has finished.
            tensor.record_stream(current)
        return sent.value


def prefetch(build: Callable[[S], M], keys: Iterable[S], device: torch.device) -> Iterator[M]:
    """Yield the step inputs on `device`, in order.

    On CUDA a thread builds, pins and copies the next inputs on a separate stream while the GPU computes. On a CPU each
    input is built when it is needed, because the step itself uses all cores.

    Args:
        build: builds one input on the host from its key.
        keys: one key for each input, for instance the indices of its users or items.
        device: device of the steps.
    """
    if device.type != "cuda":
        for key in keys:
            yield build(key)
        return
    copies = CopyStream(device)
    for sent in map_ahead(lambda key: copies.send(build(key)), keys):
        yield copies.receive(sent)


def map_ahead(function: Callable[[S], T], values: Iterable[S], ahead: int = AHEAD) -> Iterator[T]:
    """Yield `function(value)` for each value. A thread computes up to `ahead` results in advance."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="xsmoe-batches") as worker:
        try:
            for value in values:
                waiting.append(worker.submit(function, value))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
