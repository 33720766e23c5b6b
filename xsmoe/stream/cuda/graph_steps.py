"""Training steps as CUDA graphs. One graph is captured for each input shape, and then replayed."""

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from xsmoe.nn import Recommender
from xsmoe.out_of_memory import is_out_of_memory, short_message
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.graph_capture import CannotCapture, Capture, CudaCapture
from xsmoe.stream.precision import LossScaler
from xsmoe_kernels.runtime.profiler_ranges import ranges_open

T = TypeVar("T")
Step = Callable[[StepInput], Tensor]

NO_GRAPHS = "training steps run one operation at a time, without CUDA graphs: {}"
"""Warning for users; the placeholder is the reason."""


class _GraphedStep(NamedTuple):
    """A captured step.

    Attributes:
        given: static input that the graph reads.
        replay: replays the graph.
        loss: tensor that holds the loss after a replay.
        step: keeps everything else alive that the graph reads.
    """

    given: StepInput
    replay: Callable[[], None]
    loss: Tensor
    step: Step


class GraphedSteps:
    """Training steps of a window. Each step replays the CUDA graph for its input shape.

    Graph replay leaves weights, optimizer state, counters, loss scale and RNG state as eager execution would. Changes
    made by the warm-up steps before a capture are rolled back.

    All steps run eagerly if a step cannot be captured or if graphs do not fit into memory. Steps also run eagerly
    while a profile is recorded, because a profiler does not see the parts of a replayed step.

    Args:
        model: the trained model, in training mode.
        optimizer: optimizer of the steps. Its initial state must be zeros, as for Adam.
        scaler: loss scaler for float16.
        warn: called with a message if steps run without graphs.
        capture: captures the graphs; default `CudaCapture` on the model's device.
        reason: why graphs must not be captured, if that is known before.
    """

    def __init__(
        self,
        model: Recommender,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler | None = None,
        warn: Callable[[str], None] = lambda _: None,
        capture: Capture | None = None,
        reason: str | None = None,
    ) -> None:
        self._model, self._optimizer, self._scaler, self._warn = model, optimizer, scaler, warn
        self._device = next(model.parameters()).device
        self._capture = capture
        self._graphs: dict[Hashable, _GraphedStep] = {}
        self._held, self._addresses = _referenced_storage(model)
        self._profile_warned = False
        self.reason = reason

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, step: Step, given: StepInput) -> Tensor:
        """Run a step and return its loss, without synchronizing.

        Args:
            step: must do the same at every call and read everything that changes from its input. It is called during
                a capture only.
            given: input of the step, on the model's device.
        """
        if self.reason is not None or self._profiling():
            return step(given)
        key = given.graph_key()
        if key not in self._graphs and not self._try_capture(key, step, given):
            return step(given)
        graph = self._graphs[key]
        graph.given.copy_(given)
        graph.replay()
        return graph.loss.clone()

    def drop_if_moved(self) -> None:
        """Drop the graphs if tensors that they read or write were reallocated. Call at the start of an epoch."""
        held, addresses = _referenced_storage(self._model)
        if addresses != self._addresses:
            self.drop()
        self._held, self._addresses = held, addresses

    def drop(self) -> None:
        """Drop the graphs and free their memory. Later steps are captured again."""
        if self._graphs:
            self._drop()

    def retry_without_graphs(self, what: str, work: Callable[[], T]) -> T:
        """Return the result of `work`. If it runs out of memory, drop all graphs for good and call it again.

        Args:
            what: name of the work, for the warning.
            work: must not change anything if it fails.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not self._graphs or not is_out_of_memory(error):
                raise
            reason = f"not enough memory for CUDA graphs and {what} ({short_message(error)})"
        self._disable(reason)
        return work()

    def _try_capture(self, key: Hashable, step: Step, given: StepInput) -> bool:
        try:
            self._graphs[key] = self._captured(step, given)
            return True
        except CannotCapture as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"not enough memory for CUDA graphs ({short_message(error)})"
        self._disable(reason)
        return False

    def _disable(self, reason: str) -> None:
        """Stop using graphs. Call after the `except` block, because the error keeps the step's tensors alive."""
        self.reason = reason
        self._drop()
        if self._scaler is not None:
            self._scaler.recover(self._optimizer)
        self._warn(NO_GRAPHS.format(reason))

    def _drop(self) -> None:
        self._graphs.clear()
        # The last capture allocated the gradients in the graphs' memory. Every step starts without gradients.
        self._optimizer.zero_grad(set_to_none=True)
        self._capturer().free()

    def _capturer(self) -> Capture:
        if self._capture is None:
            self._capture = CudaCapture(self._device)
        return self._capture

    def _profiling(self) -> bool:
        if ranges_open() and not self._profile_warned:
            self._profile_warned = True
            self._warn("while a profile is recorded, training steps run one operation at a time, without CUDA graphs")
        return ranges_open()

    def _captured(self, step: Step, given: StepInput) -> _GraphedStep:
        static = given.clone()

        def run() -> Tensor:
            # torch warns if `capturable` is set outside of a capture.
            _set_capturable(self._optimizer, self._device.type == "cuda" and torch.cuda.is_current_stream_capturing())
            return step(static)

        try:
            with _rolled_back(self._model, self._optimizer, self._scaler, self._device):
                replay, loss = self._capturer()(run)
        finally:
            _set_capturable(self._optimizer, False)
        return _GraphedStep(static, replay, loss, step)


def graphs_requested(config: StreamConfig) -> bool:
    """Return whether the settings ask for graphs. If so, batches are padded even where graphs cannot be captured."""
    return config.graph and torch.device(config.device).type == "cuda"


def no_graphs_reason(config: StreamConfig) -> str | None:
    """Return why training steps are not captured with these settings on this machine; None if they are."""
    if not config.graph:
        return "graph is off"
    if (kind := torch.device(config.device).type) != "cuda":
        return f"CUDA graphs need a GPU, and device is {kind}"
    if os.environ.get("XSMOE_DEBUG") == "1":
        return "XSMOE_DEBUG=1 enables checks that read values on the host"
    return None


def _set_capturable(optimizer: torch.optim.Optimizer, capturable: bool) -> None:
    for group in optimizer.param_groups:
        group["capturable"] = capturable


def _referenced_storage(model: Recommender) -> tuple[list[Any], list[int]]:
    """Return the tensors whose addresses graphs contain, and these addresses.

    The caller must keep the tensors alive so that their memory is not reused.
    """
    tensors = [*model.parameters(), *model.buffers()]
    frozen, versions = [], []
    for _, _, bank in model.items.banks():
        tensors += [bank.utilization.norm, bank.utilization.gate]
        if bank.top_k is None and (experts := bank.frozen_experts()) is not None:
            # Under autocast a step reads cached copies of them, which are made again when the experts change.
            frozen.append(experts)
            versions += [experts.down._version, experts.up._version]
    addresses = [id(one) for one in (*tensors, *frozen)] + [tensor.data_ptr() for tensor in tensors]
    return [*tensors, *frozen], addresses + versions


@contextmanager
def _rolled_back(
    model: Recommender, optimizer: torch.optim.Optimizer, scaler: LossScaler | None, device: torch.device
) -> Iterator[None]:
    """Undo the changes of steps inside the block. Optimizer state that was created inside becomes zeros."""
    before = [(tensor, tensor.detach().clone()) for tensor in _step_state(model, optimizer, scaler)]
    known = {id(tensor) for tensor, _ in before}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
            for tensor in _step_state(model, optimizer, scaler):
                if id(tensor) not in known:
                    tensor.zero_()


def _step_state(model: Recommender, optimizer: torch.optim.Optimizer, scaler: LossScaler | None) -> Iterator[Tensor]:
    """Yield all tensors that a training step changes."""
    yield from (parameter for parameter in model.parameters() if parameter.requires_grad)
    for _, _, bank in model.items.banks():
        yield from (bank.utilization.norm, bank.utilization.gate)
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    if scaler is not None:
        yield from scaler.tensors()
