"""What steps take, in their order: on CUDA built, pinned and copied while earlier steps run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from xsmoe.stream.cuda.streams import stream_for

AHEAD = 2
"""Inputs on CUDA that wait for their step."""
IN_FLIGHT = 2
"""Steps that the host may be ahead of the GPU: the memory of their inputs is not free before they have run."""


class Movable(Protocol):
    """Tensors that go to a device together."""

    def pin(self) -> Self:
        """The same in pinned memory."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        ...

    def tensors(self) -> list[Tensor]:
        """All of them."""
        ...


S = TypeVar("S")
T = TypeVar("T")
M = TypeVar("M", bound=Movable)


class Sent(NamedTuple, Generic[M]):
    """An input on its way to the device, and the event of its arrival."""

    given: M
    arrived: torch.cuda.Event


class CopyStream:
    """A stream for copies to a GPU, beside the one that the steps run on.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = stream_for("copies", device)
        self._passed: deque[torch.cuda.Event] = deque()

    def send(self, given: M) -> Sent[M]:
        """Starts the copy of an input on the host; for one thread, which waits while the GPU is too far behind."""
        if len(self._passed) >= IN_FLIGHT:
            self._passed.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            moved = given.pin().to(self._device)
            return Sent(moved, self._stream.record_event())

    def receive(self, sent: Sent[M]) -> M:
        """Has the current stream wait for an input, and only the stream: the host goes on."""
        current = torch.cuda.current_stream(self._device)
        self._passed.append(current.record_event())
        current.wait_event(sent.arrived)
        for tensor in sent.given.tensors():
            # The memory is the copies' own, and must not go back to them before the step is through with it.
            tensor.record_stream(current)
        return sent.given


def feed(build: Callable[[S], M], chosen: Iterable[S], device: torch.device) -> Iterator[M]:
    """The steps' inputs on `device`, in their order.

    On CUDA a thread builds, pins and copies the next ones, on a stream of its own, while the GPU is busy; on the CPU
    each is built when its turn comes, because the step itself uses all cores.

    Args:
        build: from the numbers of some users, or items, to their step's input on the host.
        chosen: what `build` takes for each step.
        device: where the steps run.
    """
    if device.type != "cuda":
        for some in chosen:
            yield build(some)
        return
    copies = CopyStream(device)
    for sent in made_ahead(lambda some: copies.send(build(some)), chosen):
        yield copies.receive(sent)


def made_ahead(make: Callable[[S], T], chosen: Iterable[S], ahead: int = AHEAD) -> Iterator[T]:
    """`map(make, chosen)`, with up to `ahead` results that a thread makes while an earlier one is used."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="xsmoe-batches") as worker:
        try:
            for some in chosen:
                waiting.append(worker.submit(make, some))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
