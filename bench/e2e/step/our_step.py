"""Our training step, with the functions that `xsmoe train` uses."""

from collections.abc import Callable
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from bench.core.benchmark import Tensors
from xsmoe.data import Sequences
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream.batches.builder import IdDropout, StepInput
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.epoch import make_optimizer, train_step
from xsmoe.stream.hidden_states.placement import place
from xsmoe.stream.precision import hidden_dtype

ID_TABLE = "items.ids.weight"


class CaptureFailed(RuntimeError):
    """A step that must be captured as a CUDA graph cannot be."""


class OurStep:
    """A model, its optimizer, and the input of its steps.

    Args:
        model: on its device.
        store: hidden states of the items. They are moved to the device if they fit.
        share: (I,) each item's share of the training interactions.
        config: of the run.
        capacity: batches are padded to it for CUDA graphs; None does not pad.
    """

    def __init__(
        self,
        model: Recommender,
        store: ItemFeatures,
        share: np.ndarray,
        config: StreamConfig,
        capacity: Capacity | None = None,
    ) -> None:
        self.model, self.config, self.capacity = model.train(), config, capacity
        # No other variant has IDs, so their gradients cannot be compared.
        self.leaves: Tensors = {key: p for key, p in model.named_parameters() if p.requires_grad and key != ID_TABLE}
        self._id_dropout = IdDropout(config.id_dropout, config.seed, 0, 0)
        self._steps = count()
        self.optimizer = make_optimizer(model, config)
        self.features, _ = place(store, model.items.modalities, config)
        self._dtype, self._log_share = hidden_dtype(model, config), np.log(share)

    def sent_input(self, inputs: Tensors) -> StepInput:
        """Return the step's input on the device. Hidden states that are cached there are not gathered yet."""
        ids = partial(self._id_dropout, step=next(self._steps)) if self.model.items.with_ids else None
        return step_input(self.model, self.features, inputs["items"], self._log_share, self._dtype, self.capacity, ids)

    def gathered(self, sent: StepInput) -> StepInput:
        """Return the step's input with gathered hidden states."""
        return sent.with_hidden(self.features, self._dtype)

    def input(self, inputs: Tensors) -> StepInput:
        """Return the complete input of a step."""
        return self.gathered(self.sent_input(inputs))

    def train(self, sent: StepInput) -> Tensor:
        """Take a training step; return its loss."""
        return train_step(self.model, self.gathered(sent), self.optimizer, self.config)


def step_input(
    model: Recommender,
    features: ItemFeatures,
    items: Tensor,
    log_share: np.ndarray,
    dtype: torch.dtype,
    capacity: Capacity | None = None,
    ids: Callable[[np.ndarray], np.ndarray] | None = None,
) -> StepInput:
    """Return the input of a step on the items (B, places) of some users, on the model's device."""
    users, places = items.shape
    sequences = Sequences(np.arange(users), items.flatten().numpy(), np.arange(users + 1) * places)
    built = StepInput.build(features, model.items.modalities, sequences, log_share, dtype, capacity, ids)
    device = next(model.parameters()).device
    return (built.pin() if device.type == "cuda" else built).to(device)


def raise_capture_failed(reason: str) -> None:
    """Raise `CaptureFailed`. It is the callback of steps that may not run without a graph."""
    raise CaptureFailed(reason)
