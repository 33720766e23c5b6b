"""A small stream in which later windows have new items."""

from typing import Any

import numpy as np
import pytest
import torch

from xsmoe.data import Sequences, Window, make_windows
from xsmoe.encoders import InMemoryFeatures, ItemFeatures
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.stream import Stream, StreamConfig
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.batches.padding import Capacity

DIMS = {"image": 6, "text": 4}
NUM_ITEMS = 40
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Killed(BaseException):
    """Simulates a kill: no handler between the trainer and the test catches it."""


def features(seed: int = 0) -> InMemoryFeatures:
    generator = torch.Generator().manual_seed(seed)
    return InMemoryFeatures({n: torch.randn(NUM_ITEMS, 3, d, generator=generator) for n, d in DIMS.items()})


def windows(num_windows: int = 3, users: int = 14, each: int = 40, seed: int = 0) -> list[Window]:
    rng = np.random.default_rng(seed)
    size = users * each
    items = rng.integers(0, NUM_ITEMS // 2, size) * 2 + np.arange(size) % 2
    return make_windows(
        rng.integers(0, users, size), np.minimum(items, 12 + np.arange(size) // 20), np.arange(size), num_windows
    )


def stream(num_windows: int = 3, **options: Any) -> Stream:
    return Stream(windows(num_windows, **options), features())


def model(seed: int = 0, **options: Any) -> Recommender:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        items = XSMoE(tuple(DIMS), dim=DIMS, rank=2, out_dim=8, **options)
        return Recommender(items, UserEncoder(8, num_blocks=1, inner_dim=16))


def config(**options: Any) -> StreamConfig:
    settings = {"batch_size": 5, "epochs": 4, "warmup_epochs": 1, "patience": 2, "lr": 1e-2, "k_core": 2}
    settings |= {"history": "last", "keep": "best", "expand": True, "prune": True}
    return StreamConfig(**{**settings, "graph": "cuda" in options.get("device", "cpu"), **options})


def sequences() -> Sequences:
    """Return the sequences of three users, with 2, 5 and 3 items."""
    items = np.array([4, 4, 1, 0, 1, 2, 3, 6, 7, 4])
    return Sequences(np.arange(3), items, np.array([0, 2, 7, 10]))


def step_input(
    users: np.ndarray,
    dtype: torch.dtype = torch.float32,
    capacity: Capacity | None = None,
    source: ItemFeatures | None = None,
) -> StepInput:
    """Return the step input of some of these users."""
    log_share = np.log(np.arange(1, NUM_ITEMS + 1) / 100)
    return StepInput.build(source or features(), tuple(DIMS), sequences().take(users), log_share, dtype, capacity)


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]
