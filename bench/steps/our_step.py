"""What `xsmoe train` trains a step with."""

from collections.abc import Callable
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from bench.workload import Tensors
from xsmoe.data import Sequences
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.batches.id_dropout import IdDropout
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.epoch import make_optimizer, train_step
from xsmoe.stream.hidden_states.device_cache import place
from xsmoe.stream.precision import hidden_dtype

ID_TABLE = "items.ids.weight"


class NotCaptured(RuntimeError):
    """Steps that were to be CUDA graphs cannot be."""


class OurStep:
    """A model, its optimizer, and what feeds its steps.

    Args:
        model: on its device.
        store: the items' hidden states, which are taken to the device if they fit.
        share: (I,) each item's share of the training interactions.
        config: of the run.
        room: what batches are padded to, as graphs want them; None pads nothing.
    """

    def __init__(
        self,
        model: Recommender,
        store: ItemFeatures,
        share: np.ndarray,
        config: StreamConfig,
        room: Capacity | None = None,
    ) -> None:
        self.model, self.config, self.room = model.train(), config, room
        # No other variant has IDs whose gradients theirs could be compared with.
        self.leaves: Tensors = {key: p for key, p in model.named_parameters() if p.requires_grad and key != ID_TABLE}
        self._id_dropout = IdDropout(config.id_dropout, config.seed, 0, 0)
        self._steps = count()
        self.optimizer = make_optimizer(model, config)
        self.features, _ = place(store, model.items.modalities, config)
        self._dtype, self._log_share = hidden_dtype(model, config), np.log(share)

    def sent(self, rows: Tensors) -> StepInput:
        """The input of a step on users (B, places) on the device, where resident hidden states are not gathered yet."""
        ids = partial(self._id_dropout, step=next(self._steps)) if self.model.items.with_ids else None
        return step_input(self.model, self.features, rows["items"], self._log_share, self._dtype, self.room, ids)

    def gathered(self, given: StepInput) -> StepInput:
        """The same with its hidden states."""
        return given.gathered(self.features, self._dtype)

    def given(self, rows: Tensors) -> StepInput:
        """The whole input of a step."""
        return self.gathered(self.sent(rows))

    def train(self, given: StepInput) -> Tensor:
        """A step; returns its loss."""
        return train_step(self.model, self.gathered(given), self.optimizer, self.config)


def step_input(
    model: Recommender,
    features: ItemFeatures,
    items: Tensor,
    log_share: np.ndarray,
    dtype: torch.dtype,
    room: Capacity | None = None,
    ids: Callable[[np.ndarray], np.ndarray] | None = None,
) -> StepInput:
    """What a step takes for some users' items (B, places), on the model's device."""
    users, places = items.shape
    sequences = Sequences(np.arange(users), items.flatten().numpy(), np.arange(users + 1) * places)
    built = StepInput.build(features, model.items.modalities, sequences, log_share, dtype, room, ids)
    device = next(model.parameters()).device
    return (built.pin() if device.type == "cuda" else built).to(device)


def refuse(reason: str) -> None:
    """For steps that must be captured."""
    raise NotCaptured(reason)
