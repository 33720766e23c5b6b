"""Recognition of out-of-memory errors, and the numbers in torch's messages."""

import re

import torch

# These errors have no class of their own: torch's CPU allocator on Linux and on Windows, the C++ allocator, and CUDA
# allocations outside torch's allocator.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)

_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)")
_ALLOCATED = re.compile(r"[Oo]f the allocated memory ([\d.]+) (bytes|[KMG]iB) is allocated by PyTorch")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation by torch or NumPy failed, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def short_message(error: BaseException) -> str:
    """Return torch's message up to the requested size, without its advice."""
    text = " ".join(str(error).split())
    found = _REQUEST.search(text)
    return text[: found.end()] if found else text.split(". ")[0] or type(error).__name__


def requested(error: BaseException) -> int:
    """Return the bytes that the failed allocation requested; 0 if the message does not state them."""
    return _bytes(_REQUEST, error) or 0


def allocated(error: BaseException) -> int | None:
    """Return the bytes of all tensors on the GPU when the allocation failed; None if the message lacks them."""
    return _bytes(_ALLOCATED, error)


def _bytes(pattern: re.Pattern[str], error: BaseException) -> int | None:
    found = pattern.search(" ".join(str(error).split()))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
