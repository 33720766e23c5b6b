"""Fixtures for all tests."""

import gc
import os
from collections.abc import Iterator

# Small tensors do not benefit from threads, and threads are slow on a busy machine. torch reads this at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Deterministic cuBLAS requires this variable and reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this variable when it is first imported, which happens later.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Exclude all loaded objects from garbage collection, because some tested functions call it often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Fill `torch.empty` with NaN (integers with their largest value) to detect outputs that are not written."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # torch fills memory only with deterministic algorithms. An operation without one may warn but must not fail.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)
