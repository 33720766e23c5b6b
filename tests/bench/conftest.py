"""A bench that measures little: tests look at what it says, not at how fast anything is."""

import pytest
import torch

from bench.core import benchmark, bound


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and rotates through little memory."""
    monkeypatch.setattr(bound, "COPIED_BYTES", 1 << 16)
    monkeypatch.setattr(benchmark, "ROTATED_BYTES", 1)


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")
