"""Fixtures of every test."""

import gc
import os
from collections.abc import Iterator

# Small tensors gain nothing from threads, and lose much where the machine is busy. Read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Deterministic cuBLAS wants it, and reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which is later than this.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Keeps what is loaded by now out of collections of garbage, for which some of what is tested asks often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Fills `torch.empty` with NaN (integers with their largest value), so that an unwritten output shows."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Filling comes with deterministic algorithms only; an operation that has none may warn, but must not fail.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)
