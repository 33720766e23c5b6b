"""A record of every allocation on a GPU, which PyTorch's memory viewer shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

VIEWER = "https://docs.pytorch.org/memory_viz"


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Writes what is allocated and freed on the GPU inside the block, with the lines that asked for it.

    The file opens in `VIEWER`, a page that reads it in the browser and uploads nothing.

    Raises:
        RuntimeError: there is no GPU, of whose memory alone torch keeps a history.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("a snapshot of allocations needs a GPU that torch finds; there is none here")
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(stacks="python")
    try:
        yield
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
