"""Precision of training steps: autocast, and a loss scaler for float16."""

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
    """Return the dtype of autocast; None if steps compute in float32.

    Raises:
        ValueError: float16 on a device that is not CUDA.
    """
    on_cuda = torch.device(config.device).type == "cuda"
    name = config.precision
    if name == "auto":
        name = "float32" if not on_cuda else "float16" if config.protocol == "paper" else "bfloat16"
    if name == "float16" and not on_cuda:
        raise ValueError(
            f"precision is 'float16', which needs CUDA, but device is {config.device!r}; use --precision bfloat16 or "
            "float32, or --device cuda"
        )
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


@contextmanager
def autocast(config: StreamConfig) -> Iterator[None]:
    """Enable the configured precision inside the block."""
    dtype = autocast_dtype(config)
    with torch.autocast(torch.device(config.device).type, dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def hidden_dtype(model: Recommender, config: StreamConfig) -> torch.dtype:
    """Return the dtype to load hidden states in: the one that the step would cast them to."""
    # Sparse routing computes its logits in float32.
    return (autocast_dtype(config) if model.items.top_k is None else None) or torch.float32


class LossScaler:
    """Scales a float16 loss so that small gradients do not vanish. Steps whose gradients overflow are skipped.

    A skipped step changes no weight and halves the scale. `step` does not synchronize with the device.

    Args:
        device: device of the loss.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Run the backward pass, and an optimizer step unless a gradient is not finite."""
        with named_range("backward"):
            self._scaler.scale(loss).backward()
        with named_range("optimizer"):
            self._scaler.step(optimizer)
            self._scaler.update()

    def tensors(self) -> list[Tensor]:
        """Return the device tensors that a step changes: the scale, and the number of steps since its last change."""
        if self._scaler._scale is None:
            # They are created when the first loss is scaled.
            self._scaler.scale(torch.zeros((), device=self._device))
        scale, steps = self._scaler._scale, self._scaler._growth_tracker
        assert scale is not None
        assert steps is not None
        return [scale, steps]

    def recover(self, optimizer: torch.optim.Optimizer) -> None:
        """Discard a step that failed with an error, and allocate new tensors. Synchronizes with the device."""
        state = self._scaler.state_dict()
        self._scaler = torch.amp.GradScaler(self._device.type)
        self._scaler.load_state_dict(state)
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)

    def scale(self) -> float:
        """Return the factor of the next loss. Synchronizes with the device."""
        return float(self._scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._scaler.load_state_dict(state)


def loss_scaler(config: StreamConfig) -> LossScaler | None:
    """Return a new loss scaler for a window; None if the precision needs none."""
    return LossScaler(torch.device(config.device)) if autocast_dtype(config) == torch.float16 else None


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of steps that Adam has counted. Skipped steps do not count. Synchronizes with the device."""
    # The ID table has a separate count for every row.
    steps = [state["step"] for state in optimizer.state.values() if state["step"].dim() == 0]
    return int(torch.stack(steps).max()) if steps else 0


def divergence(losses: np.ndarray, finite_weights: bool, scaler: LossScaler | None) -> str | None:
    """Return a description of the divergence if an epoch diverged, else None.

    With a scaler a single loss that is not finite is not a divergence, because the scaler skipped that step. Training
    has diverged if no loss of the epoch is finite, or if the scale is below 1. Then gradients have overflowed
    repeatedly although the scale no longer enlarges them.

    Args:
        losses: (S,) losses of all steps.
        finite_weights: whether all weights are finite after the last step.
        scaler: loss scaler of the epoch.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad) and (scaler is None or len(bad) == len(losses)):
        return f"the loss is {losses[bad[0]]} at step {bad[0]} of {len(losses)}"
    if not finite_weights:
        return f"the weights are not finite after the last step of {len(losses)}"
    if scaler is not None and (scale := scaler.scale()) < 1:
        return (
            f"the loss scale is {scale:g} after the last step of {len(losses)}, because gradients overflow repeatedly"
        )
    return None
