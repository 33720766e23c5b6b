"""What a training step takes: a batch, built from arrays on the host, and the hidden states of its items."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from xsmoe.data import Sequences
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Batch
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.hidden_states.device_cache import ResidentFeatures
from xsmoe.stream.hidden_states.transfer import HiddenStates
from xsmoe_kernels.runtime.profiler_ranges import named_range


@dataclass(frozen=True)
class StepInput:
    """A batch, and the hidden states of its items, level by level for each modality.

    Attributes:
        batch: padded or not.
        hidden: of all modalities, or none if they lie on the device, where the step gathers them itself.
        num_users, num_inputs: of the batch without its padding.
        complete: of hidden states on the device, whether all items have each modality.
    """

    batch: Batch
    hidden: HiddenStates
    num_users: int
    num_inputs: int
    complete: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        features: ItemFeatures,
        modalities: tuple[str, ...],
        sequences: Sequences,
        log_share: np.ndarray,
        dtype: torch.dtype = torch.float32,
        capacity: Capacity | None = None,
        ids: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Self:
        """Gathers on the host what some users' step takes.

        Args:
            features: the items' hidden states.
            modalities: those that the model encodes.
            sequences: (B,) of at least 2 items each.
            log_share: for every item the log of its share of the training interactions.
            dtype: of the hidden states.
            capacity: what the batch is padded to; None pads nothing.
            ids: from the distinct items (C,) to their rows of the ID table, (C,) int64; None leaves IDs out.
        """
        batch = Batch.from_sequences(sequences.items, sequences.offsets, log_share)
        num_users, num_inputs = len(sequences), batch.inputs.shape[0]
        if ids is not None:
            batch = replace(batch, ids=torch.from_numpy(ids(batch.items.numpy())))
        if capacity is not None:
            batch = capacity.pad(batch)
        items = batch.items.numpy()
        if isinstance(features, ResidentFeatures):
            return cls(batch, HiddenStates(), num_users, num_inputs, features.complete(items, modalities))
        return cls(batch, HiddenStates(features.hidden(items, modalities, dtype=dtype)), num_users, num_inputs)

    def gathered(self, features: ItemFeatures, dtype: torch.dtype) -> Self:
        """The same with all hidden states, gathered on the device if they are not there yet."""
        if self.hidden or not isinstance(features, ResidentFeatures):
            return self
        with named_range("gather"):
            return replace(self, hidden=HiddenStates(features.gather(self.batch.items, self.complete, dtype)))

    def pin(self) -> Self:
        """The same in pinned memory, from which a GPU copies without making the host wait."""
        return replace(self, batch=self.batch.packed().pin(), hidden=self.hidden.pin())

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, batch=self.batch.to(device), hidden=self.hidden.to(device))

    def clone(self) -> Self:
        """A copy."""
        return replace(self, batch=self.batch.clone(), hidden=self.hidden.each(Tensor.clone))

    def copy_(self, other: "StepInput") -> None:
        """Takes over the values of another input of the same `kind`."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def tensors(self) -> list[Tensor]:
        """All that it holds, a packed batch as one tensor."""
        batch = self.batch
        held = list(batch.tensors().values()) if batch.storage is None else [batch.storage]
        return held + self.hidden.tensors()

    def kind(self) -> Hashable:
        """What a CUDA graph holds for good: all shapes and dtypes, and what decides about those of hidden states."""
        levels = tuple(
            (name, *((level.shape, level.dtype) for level in levels)) for name, levels in self.hidden.items()
        )
        return (*(tensor.shape for tensor in self.batch.tensors().values()), levels, tuple(self.complete.items()))
