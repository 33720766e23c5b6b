"""Random numbers that depend on the seed, the window and the epoch only, so that a resumed run draws the same ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, window: int, epoch: int, purpose: str) -> int:
    """A seed of its own for each purpose in each epoch of each window, in [0, 2^63)."""
    words = [seed, window, epoch, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch inside the block, and puts the random state back behind it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
