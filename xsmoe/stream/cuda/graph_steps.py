"""Training steps as CUDA graphs: captured once for every shape of their input, then replayed."""

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from xsmoe.nn import Recommender
from xsmoe.out_of_memory import is_shortage, said
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.graph_capture import CannotCapture, Capture, CudaCapture
from xsmoe.stream.precision import LossScaler
from xsmoe_kernels.runtime.profiler_ranges import ranges_open

T = TypeVar("T")
Step = Callable[[StepInput], Tensor]

WITHOUT = "training steps run one operation at a time, without CUDA graphs: {}"
"""What users are told, with the reason."""


class _Captured(NamedTuple):
    """A graph: the input that it reads, what replays it, the loss that it leaves, and what holds all else it reads."""

    given: StepInput
    replay: Callable[[], None]
    loss: Tensor
    step: Step


class CapturedSteps:
    """The training steps of a window, each of which replays the graph for its kind of input.

    Weights, optimizer, counters, the scale of the loss and random numbers are after a step what they would be without
    graphs: what the steps ahead of a capture change is put back. Where a step cannot be captured, or memory does not
    suffice for graphs, all steps run without one, and so do those that a profile looks at, which would see nothing of
    a step's parts.

    Args:
        model: that the steps train, in training mode.
        optimizer: that they take, which begins with zeros as Adam does.
        scaler: of their loss in float16.
        tell: told why steps run without a graph, if they do.
        capture: makes the graphs; default `CudaCapture` on the model's device.
        reason: why none is to be captured, if that is known.
    """

    def __init__(
        self,
        model: Recommender,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler | None = None,
        tell: Callable[[str], None] = lambda _: None,
        capture: Capture | None = None,
        reason: str | None = None,
    ) -> None:
        self._model, self._optimizer, self._scaler, self._tell = model, optimizer, scaler, tell
        self._device = next(model.parameters()).device
        self._capture = capture
        self._graphs: dict[Hashable, _Captured] = {}
        self._held, self._places = _bound(model)
        self._profile_told = False
        self.reason = reason

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
        if kind not in self._graphs and not self._capture_one(kind, step, given):
            return step(given)
        graph = self._graphs[kind]
        graph.given.copy_(given)
        graph.replay()
        return graph.loss.clone()

    def forget_if_moved(self) -> None:
        """Drops the graphs if what they read or write is no longer where it was; at the beginning of an epoch."""
        held, places = _bound(self._model)
        if places != self._places:
            self.forget()
        self._held, self._places = held, places

    def forget(self) -> None:
        """Drops the graphs and gives back their memory; the next steps are captured anew."""
        if self._graphs:
            self._drop()

    def making_room(self, what: str, work: Callable[[], T]) -> T:
        """The result of `work`; if memory is short beside the graphs, without them in a second try, and from then on.

        Args:
            what: the work's name, for who is told.
            work: changes nothing if it fails.
        """
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not self._graphs or not is_shortage(error):
                raise
            reason = f"memory does not suffice for them and {what} ({said(error)})"
        self._give_up(reason)
        return work()

    def _capture_one(self, kind: Hashable, step: Step, given: StepInput) -> bool:
        try:
            self._graphs[kind] = self._captured(step, given)
            return True
        except CannotCapture as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            reason = f"memory does not suffice for them ({said(error)})"
        self._give_up(reason)
        return False

    def _give_up(self, reason: str) -> None:
        """After the handler of an error, which holds on to all that the step had made."""
        self.reason = reason
        self._drop()
        if self._scaler is not None:
            self._scaler.recover(self._optimizer)
        self._tell(WITHOUT.format(reason))

    def _drop(self) -> None:
        self._graphs.clear()
        # The last capture left them in the graphs' memory; every step begins without.
        self._optimizer.zero_grad(set_to_none=True)
        self._capturer().forget()

    def _capturer(self) -> Capture:
        if self._capture is None:
            self._capture = CudaCapture(self._device)
        return self._capture

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
            with _undone(self._model, self._optimizer, self._scaler, self._device):
                replay, loss = self._capturer()(run)
        finally:
            _set_capturable(self._optimizer, False)
        return _Captured(static, replay, loss, step)


def wanted(config: StreamConfig) -> bool:
    """Whether a configuration asks for captured steps, and so for padded batches, wherever and however it runs."""
    return config.graph and torch.device(config.device).type == "cuda"


def refusal(config: StreamConfig) -> str | None:
    """Why training steps of a configuration are not captured here; None if they are."""
    if not config.graph:
        return "graph is off"
    if (kind := torch.device(config.device).type) != "cuda":
        return f"CUDA graphs need a GPU, and device is {kind}"
    if os.environ.get("XSMOE_DEBUG") == "1":
        return "XSMOE_DEBUG=1 has checks read values on the host"
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
def _undone(
    model: Recommender, optimizer: torch.optim.Optimizer, scaler: LossScaler | None, device: torch.device
) -> Iterator[None]:
    """Puts back what steps inside the block change; state that the optimizer has only since then becomes zeros."""
    before = [(tensor, tensor.detach().clone()) for tensor in _changed_by_steps(model, optimizer, scaler)]
    known = {id(tensor) for tensor, _ in before}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
            for tensor in _changed_by_steps(model, optimizer, scaler):
                if id(tensor) not in known:
                    tensor.zero_()


def _changed_by_steps(
    model: Recommender, optimizer: torch.optim.Optimizer, scaler: LossScaler | None
) -> Iterator[Tensor]:
    yield from (parameter for parameter in model.parameters() if parameter.requires_grad)
    for _, _, bank in model.items.banks():
        yield from (bank.utilization.norm, bank.utilization.gate)
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    if scaler is not None:
        yield from scaler.tensors()
