"""Whether a call makes the host wait for a GPU."""

from collections.abc import Callable
from typing import Any

import torch


def assert_waits_for_nothing(run: Callable[[], Any]) -> None:
    """Fails if a call, once it has run before, makes the host wait for the GPU."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
