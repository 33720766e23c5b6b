"""An epoch's batches, built from arrays, on CUDA in pinned memory and ahead of the steps that take them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from xsmoe.data import Sequences
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Batch

AHEAD = 2
"""Batches that wait for their step on CUDA."""


@dataclass(frozen=True)
class StepInput:
    """What a training step takes: a batch, and the hidden states of its items, level by level for each modality."""

    batch: Batch
    hidden: Mapping[str, list[Tensor]]

    @classmethod
    def build(
        cls,
        features: ItemFeatures,
        modalities: tuple[str, ...],
        sequences: Sequences,
        log_share: np.ndarray,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Gathers on the host what some users' step takes.

        Args:
            features: the items' hidden states.
            modalities: those that the model encodes.
            sequences: (B,) of at least 2 items each.
            log_share: for every item the log of its share of the training interactions.
            dtype: of the hidden states.
        """
        batch = Batch.from_sequences(sequences.items, sequences.offsets, log_share)
        return cls(batch, features.hidden(batch.items.numpy(), modalities, dtype=dtype))

    def pin(self) -> Self:
        """The same in pinned memory, from which a GPU copies without making the host wait."""
        # Levels may be slices of one tensor, each of which would pin as much as all of them.
        return type(self)(self.batch.pin(), self._each_level(lambda level: level.contiguous().pin_memory()))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(self.batch.to(device), self._each_level(lambda level: level.to(device, non_blocking=True)))

    def _each_level(self, change: Callable[[Tensor], Tensor]) -> dict[str, list[Tensor]]:
        return {name: [change(level) for level in levels] for name, levels in self.hidden.items()}


def feed(
    build: Callable[[np.ndarray], StepInput], chosen: Iterable[np.ndarray], device: torch.device
) -> Iterator[StepInput]:
    """The steps' inputs on `device`, in their order.

    On CUDA a thread builds and pins the next ones while the GPU is busy; on the CPU each is built when its turn comes,
    because the step itself uses all cores.

    Args:
        build: from the places of some users to their step's input on the host.
        chosen: each step's users.
        device: where the steps run.
    """
    if device.type != "cuda":
        for users in chosen:
            yield build(users)
        return
    for built in built_ahead(lambda users: build(users).pin(), chosen):
        yield built.to(device)


def built_ahead(
    build: Callable[[np.ndarray], StepInput], chosen: Iterable[np.ndarray], ahead: int = AHEAD
) -> Iterator[StepInput]:
    """`map(build, chosen)`, with up to `ahead` results that a thread builds while an earlier one is used."""
    waiting: deque[Future[StepInput]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="xsmoe-batches") as worker:
        try:
            for users in chosen:
                waiting.append(worker.submit(build, users))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
