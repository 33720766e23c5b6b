"""Seeds that depend only on the run's seed, the window and the epoch. A resumed run draws the same random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, window: int, epoch: int, purpose: str) -> int:
    """Return a separate seed in [0, 2^63) for each purpose in each epoch of each window."""
    words = [seed, window, epoch, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block, and restore the random state after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
