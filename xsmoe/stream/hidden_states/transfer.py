"""Hidden states of some items, on their way from the host to a device."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor


class HiddenStates(dict[str, list[Tensor]]):
    """The levels of each modality, all (N, D) or (1, D) where the items share the row."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """With every level changed."""
        return type(self)({name: [change(level) for level in levels] for name, levels in self.items()})

    def pin(self) -> Self:
        """The same in pinned memory, from which a GPU copies without making the host wait."""
        # Levels may be slices of one tensor, each of which would pin as much as all of them.
        return self.each(lambda level: level.contiguous().pin_memory())

    def to(self, device: torch.device) -> Self:
        """The same on another device, once the copies from pinned memory are through."""
        return self.each(lambda level: level.to(device, non_blocking=True))

    def tensors(self) -> list[Tensor]:
        """All levels."""
        return [level for levels in self.values() for level in levels]
