"""The most memory that a step takes on a GPU at any moment."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def peak_bytes(step: Callable[[], Iterable[Tensor]], device: torch.device) -> int | None:
    """Bytes of torch's allocator at the peak of a step, beyond what was there before and what the step returns.

    None on a CPU, whose allocator keeps no account.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in step())}
    torch.cuda.synchronize(device)
    returned = sum(storage.nbytes() for storage in storages.values())
    return max(0, torch.cuda.max_memory_allocated(device) - before - returned)
