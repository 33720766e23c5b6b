"""Training steps as CUDA graphs: captured once for every shape of their input, then replayed."""

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xsmoe.nn import Recommender
from xsmoe.stream.batches import StepInput
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.precision import autocast_dtype
from xsmoe.stream.streams import stream_for
from xsmoe_kernels.ranges import ranges_open

Step = Callable[[StepInput], Tensor]
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""From a step to what replays it, and where its loss lies then."""

WARM_UP = 3
"""Steps ahead of a capture, as torch advises: what is compiled, tuned or made at the first call must not go into it."""

_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed, held because torch may go on asking them."""


class CannotCapture(RuntimeError):
    """A step does what no CUDA graph can hold; the message says what."""


class _Captured(NamedTuple):
    """A graph: the input that it reads, what replays it, and the loss that it leaves."""

    given: StepInput
    replay: Callable[[], None]
    loss: Tensor


class CapturedSteps:
    """The training steps of a window, each of which replays the graph for its kind of input.

    Weights, optimizer, counters and random numbers are after a step what they would be without graphs: what the steps
    ahead of a capture change is put back. Where a step cannot be captured, all steps run without a graph, and so do
    those that a profile looks at, which would see nothing of a step's parts.

    Args:
        model: that the steps train, in training mode.
        optimizer: that they take, which begins with zeros as Adam does.
        tell: told why steps run without a graph, if they do.
        capture: makes the graphs; default `CudaCapture` on the model's device.
    """

    def __init__(
        self,
        model: Recommender,
        optimizer: torch.optim.Optimizer,
        tell: Callable[[str], None] = lambda _: None,
        capture: Capture | None = None,
    ) -> None:
        self._model, self._optimizer, self._tell = model, optimizer, tell
        self._device = next(model.parameters()).device
        self._capture = capture or CudaCapture(self._device)
        self._graphs: dict[Hashable, _Captured] = {}
        self._held, self._places = _bound(model)
        self._profile_told = False
        self.reason: str | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, step: Step, given: StepInput) -> Tensor:
        """Runs a step; returns its loss, which nothing has waited for.

        Args:
            step: does the same at every call, and takes all that changes from its input. Runs when it is captured.
            given: on the model's device.
        """
        if self.reason is not None or self._profiled():
            return step(given)
        kind = given.kind()
        if kind not in self._graphs:
            try:
                self._graphs[kind] = self._captured(step, given)
            except CannotCapture as error:
                self.reason = str(error)
                self._tell(f"training steps run one operation at a time, without CUDA graphs: {error}")
                return step(given)
        graph = self._graphs[kind]
        graph.given.copy_(given)
        graph.replay()
        return graph.loss.clone()

    def forget_if_moved(self) -> None:
        """Drops the graphs if what they read or write is no longer where it was; at the beginning of an epoch."""
        held, places = _bound(self._model)
        if places != self._places:
            self._graphs.clear()
        self._held, self._places = held, places

    def _profiled(self) -> bool:
        if ranges_open() and not self._profile_told:
            self._profile_told = True
            self._tell("while a profile is taken, training steps run one operation at a time, without CUDA graphs")
        return ranges_open()

    def _captured(self, step: Step, given: StepInput) -> _Captured:
        static = given.clone()

        def run() -> Tensor:
            # Outside of a capture torch warns of it.
            _set_capturable(self._optimizer, self._device.type == "cuda" and torch.cuda.is_current_stream_capturing())
            return step(static)

        try:
            with _undone(self._model, self._optimizer, self._device):
                replay, loss = self._capture(run)
        finally:
            _set_capturable(self._optimizer, False)
        return _Captured(static, replay, loss)


class CudaCapture:
    """Captures steps that replay one at a time, and so share their memory.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = stream_for("capture", device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Runs the step a few times, then captures it.

        Raises:
            CannotCapture: the step ran, and could not be captured.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                step()
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
        except RuntimeError as error:
            # It also leaves generator and allocators in the belief that it goes on, and the latter ask the graph.
            _failed.append(graph)
            generator.graphsafe_set_state(spare)
            with suppress(RuntimeError):  # it has ended
                torch._C._cuda_endAllocateToPool(index, self._pool)
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise CannotCapture(str(cause).partition("\n")[0]) from error
        return graph.replay, loss


def refusal(config: StreamConfig) -> str | None:
    """Why training steps of a configuration are not captured; None if they are."""
    if not config.graph:
        return "graph is off"
    if (kind := torch.device(config.device).type) != "cuda":
        return f"CUDA graphs need a GPU, and device is {kind}"
    if os.environ.get("XSMOE_DEBUG") == "1":
        return "XSMOE_DEBUG=1 has checks read values on the host"
    if autocast_dtype(config) == torch.float16:
        return "precision is float16, and graphs leave out its loss scaler"
    return None


def _set_capturable(optimizer: torch.optim.Optimizer, capturable: bool) -> None:
    for group in optimizer.param_groups:
        group["capturable"] = capturable


def _bound(model: Recommender) -> tuple[list[Any], list[int]]:
    """What graphs read and write where it lies, to be held so that its place is not given away; and where that is."""
    tensors = [*model.parameters(), *model.buffers()]
    frozen, versions = [], []
    for _, _, bank in model.items.banks():
        tensors += [bank.utilization.norm, bank.utilization.gate]
        if bank.top_k is None and (experts := bank.frozen_experts()) is not None:
            # Under autocast a step reads what was derived from them once, and anew where they have changed.
            frozen.append(experts)
            versions += [experts.down._version, experts.up._version]
    places = [id(one) for one in (*tensors, *frozen)] + [tensor.data_ptr() for tensor in tensors]
    return [*tensors, *frozen], places + versions


@contextmanager
def _undone(model: Recommender, optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
    """Puts back what steps inside the block change; state that the optimizer has only since then becomes zeros."""
    before = [(tensor, tensor.detach().clone()) for tensor in _changed_by_steps(model, optimizer)]
    known = {id(tensor) for tensor, _ in before}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
            for tensor in _changed_by_steps(model, optimizer):
                if id(tensor) not in known:
                    tensor.zero_()


def _changed_by_steps(model: Recommender, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from (parameter for parameter in model.parameters() if parameter.requires_grad)
    for _, _, bank in model.items.banks():
        yield from (bank.utilization.norm, bank.utilization.gate)
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
