"""The most memory that a step takes on a GPU at any moment."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Peak(NamedTuple):
    """Bytes of torch's allocator.

    Attributes:
        growth: at the peak of a step, beyond what was there before. Some of what it returns is among them, all of it
            or none: what is made after the peak is not.
        returned: what the step returns, each storage once.
    """

    growth: int
    returned: int


def measure_peak(step: Callable[[], Iterable[Tensor]], device: torch.device) -> Peak | None:
    """What a step takes; None on a CPU, whose allocator keeps no account."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in step())}
    torch.cuda.synchronize(device)
    growth = torch.cuda.max_memory_allocated(device) - before
    return Peak(growth, sum(storage.nbytes() for storage in storages.values()))
