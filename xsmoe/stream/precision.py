"""In what precision a training step computes: autocast, and a scaler of the loss where that is float16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig
from xsmoe_kernels.runtime.profiler_ranges import named_range


def autocast_dtype(config: StreamConfig) -> torch.dtype | None:
    """What autocast casts to; None where a step computes in float32.

    Raises:
        ValueError: float16 on a device that is not CUDA.
    """
    on_cuda = torch.device(config.device).type == "cuda"
    name = config.precision
    if name == "auto":
        name = "float32" if not on_cuda else "float16" if config.protocol == "paper" else "bfloat16"
    if name == "float16" and not on_cuda:
        raise ValueError(
            f"precision is 'float16', which trains on CUDA only, but device is {config.device!r}; give --precision "
            "bfloat16 or float32, or --device cuda"
        )
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


@contextmanager
def autocast(config: StreamConfig) -> Iterator[None]:
    """The precision that the configuration asks for."""
    dtype = autocast_dtype(config)
    with torch.autocast(torch.device(config.device).type, dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def hidden_dtype(model: Recommender, config: StreamConfig) -> torch.dtype:
    """The dtype that hidden states are wanted in: the one that the step would cast them to."""
    # Sparse routing takes its logits in float32.
    return (autocast_dtype(config) if model.items.top_k is None else None) or torch.float32


class LossScaler:
    """Scales a float16 loss, so that small gradients do not vanish, and skips the steps whose gradients overflow.

    A skipped step changes no weight and halves the scale. Nothing waits for the device until an epoch is over.

    Args:
        device: where the loss is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward of the loss, and a step of the optimizer unless some gradient is not finite."""
        with named_range("backward"):
            self._scaler.scale(loss).backward()
        with named_range("optimizer"):
            self._scaler.step(optimizer)
            self._scaler.update()

    def tensors(self) -> list[Tensor]:
        """What a step changes: the scale, and the number of steps since it last changed; on the device."""
        if self._scaler._scale is None:
            # The first loss that is scaled makes them.
            self._scaler.scale(torch.zeros((), device=self._device))
        scale, steps = self._scaler._scale, self._scaler._growth_tracker
        assert scale is not None
        assert steps is not None
        return [scale, steps]

    def recover(self, optimizer: torch.optim.Optimizer) -> None:
        """After an error inside `step`: forgets that step, in new tensors; waits for the device."""
        state = self._scaler.state_dict()
        self._scaler = torch.amp.GradScaler(self._device.type)
        self._scaler.load_state_dict(state)
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)

    def scale(self) -> float:
        """The factor of the next loss; waits for the device."""
        return float(self._scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, as plain values."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._scaler.load_state_dict(state)


def loss_scaler(config: StreamConfig) -> LossScaler | None:
    """The scaler that a window's training needs, at its initial scale; None where none is needed."""
    return LossScaler(torch.device(config.device)) if autocast_dtype(config) == torch.float16 else None


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """The steps that Adam has counted, which are those that a scaler did not skip; waits for the device."""
    # The ID table has a count of its own for every row.
    steps = [state["step"] for state in optimizer.state.values() if state["step"].dim() == 0]
    return int(torch.stack(steps).max()) if steps else 0


def divergence(losses: np.ndarray, finite_weights: bool, scaler: LossScaler | None) -> str | None:
    """What of an epoch shows that training cannot go on; None if it can.

    With a scaler a loss that is not finite is no divergence by itself: the scaler skipped that step, and later ones may
    do. Two things are: that no loss of the epoch was finite, and a scale below 1, for which gradients must have
    overflowed again and again although the scale no longer enlarges them.

    Args:
        losses: (S,) of every step.
        finite_weights: whether all are, after the last step.
        scaler: of the epoch's steps.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad) and (scaler is None or len(bad) == len(losses)):
        return f"loss is {losses[bad[0]]} at step {bad[0]}"
    if not finite_weights:
        return "weights are not finite after the last step"
    if scaler is not None and (scale := scaler.scale()) < 1:
        return f"loss scale is {scale:g}, since gradients go on overflowing, after the last step"
    return None
