"""Input of a training step: a batch, built from arrays on the host, and the hidden states of its items."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from xsmoe.data import Sequences
from xsmoe.data.splitmix import GOLDEN, mix
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Batch
from xsmoe.nn.item_ids import NO_ID
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.batches.prefetch import HiddenStates
from xsmoe.stream.hidden_states.device_cache import DeviceCachedFeatures
from xsmoe.stream.state.seeds import derive
from xsmoe_kernels.runtime.profiler_ranges import named_range


@dataclass(frozen=True)
class StepInput:
    """A batch and the hidden states of its items, by modality and level.

    Attributes:
        batch: the batch, padded or not.
        hidden: hidden states of all modalities. Empty if they are cached on the device; the step gathers them there.
        num_users, num_inputs: size of the batch without padding.
        complete: for hidden states cached on the device, whether all items have each modality.
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
        """Build the step input of some users on the host.

        Args:
            features: the items' hidden states.
            modalities: modalities of the model.
            sequences: (B,) sequences of at least 2 items each.
            log_share: for every item the log of its share of the training interactions.
            dtype: dtype of the hidden states.
            capacity: size to which the batch is padded; None adds no padding.
            ids: maps the distinct items (C,) to their rows of the ID table, (C,) int64; None disables IDs.
        """
        batch = Batch.from_sequences(sequences.items, sequences.offsets, log_share)
        num_users, num_inputs = len(sequences), batch.inputs.shape[0]
        if ids is not None:
            batch = replace(batch, ids=torch.from_numpy(ids(batch.items.numpy())))
        if capacity is not None:
            batch = capacity.pad(batch)
        items = batch.items.numpy()
        if isinstance(features, DeviceCachedFeatures):
            return cls(batch, HiddenStates(), num_users, num_inputs, features.complete(items, modalities))
        return cls(batch, HiddenStates(features.hidden(items, modalities, dtype=dtype)), num_users, num_inputs)

    def with_hidden(self, features: ItemFeatures, dtype: torch.dtype) -> Self:
        """Return this input with all hidden states. If they are cached on the device, gather them there."""
        if self.hidden or not isinstance(features, DeviceCachedFeatures):
            return self
        with named_range("gather"):
            return replace(self, hidden=HiddenStates(features.gather(self.batch.items, self.complete, dtype)))

    def pin(self) -> Self:
        """Return a copy in pinned memory, from which copies to a GPU are asynchronous."""
        return replace(self, batch=self.batch.packed().pin(), hidden=self.hidden.pin())

    def to(self, device: torch.device) -> Self:
        """Return a copy on another device."""
        return replace(self, batch=self.batch.to(device), hidden=self.hidden.to(device))

    def clone(self) -> Self:
        """Return a copy."""
        return replace(self, batch=self.batch.clone(), hidden=self.hidden.map_levels(Tensor.clone))

    def copy_(self, other: "StepInput") -> None:
        """Copy the values of another input with the same `graph_key` into this one."""
        for target, source in zip(self.tensors(), other.tensors(), strict=True):
            target.copy_(source)

    def tensors(self) -> list[Tensor]:
        """Return all tensors. A packed batch is one tensor."""
        batch = self.batch
        held = list(batch.tensors().values()) if batch.storage is None else [batch.storage]
        return held + self.hidden.tensors()

    def graph_key(self) -> Hashable:
        """Return everything that a CUDA graph fixes: shapes, dtypes, and what determines the hidden states' shapes."""
        levels = tuple(
            (name, *((level.shape, level.dtype) for level in levels)) for name, levels in self.hidden.items()
        )
        return (*(tensor.shape for tensor in self.batch.tensors().values()), levels, tuple(self.complete.items()))


@dataclass(frozen=True)
class IdDropout:
    """Omits the ID embedding of some items of each batch, so that content is trained for cold items.

    A draw is a function of the seed, the window, the epoch, the step and the item, by splitmix64 (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", 2014). It does not depend on the other items of the batch,
    or on the time, thread and order in which batches are built.

    Args:
        share: probability that the ID of an item is omitted, in [0, 1].
        seed: seed of the run.
        window, epoch: position in the stream.
    """

    share: float
    seed: int
    window: int
    epoch: int

    def __call__(self, items: np.ndarray, step: int) -> np.ndarray:
        """Return the row of the ID table for each item of a batch.

        Args:
            items: (C,) int64, rows of the ID table.
            step: position of the batch in the epoch.

        Returns:
            (C,) int64: the items, or -1 where the ID is omitted.
        """
        key = np.uint64(derive(self.seed, self.window, self.epoch, "ids"))
        stream = mix(key + _splitmix_state(np.array([step])))
        words = mix(stream + _splitmix_state(items))
        # 53 bits, the precision of a double.
        return np.where((words >> np.uint64(11)) * 2.0**-53 < self.share, NO_ID, items)


def _splitmix_state(numbers: np.ndarray) -> np.ndarray:
    """Return the splitmix64 states after `numbers + 1` steps from state zero."""
    return (numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN
