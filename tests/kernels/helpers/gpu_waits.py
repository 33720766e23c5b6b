"""Check that a call does not synchronize with a GPU."""

from collections.abc import Callable
from typing import Any

import torch


def assert_waits_for_nothing(run: Callable[[], Any]) -> None:
    """Fail if a call, after a first run, makes the host wait for the GPU."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
