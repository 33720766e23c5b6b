"""Errors that say that a device's memory does not suffice, and what torch says in them."""

import re

import torch

# What has no class of its own: torch's CPU allocator on Linux and on Windows, and C++'s; CUDA beside torch's allocator.
_SAID = (
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


def is_shortage(error: BaseException) -> bool:
    """Whether an allocation of torch or of NumPy failed, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def said(error: BaseException) -> str:
    """What torch says up to what was asked for, without its advice."""
    text = " ".join(str(error).split())
    found = _REQUEST.search(text)
    return text[: found.end()] if found else text.split(". ")[0] or type(error).__name__


def requested(error: BaseException) -> int:
    """The bytes that the allocation asked for which failed; 0 if torch does not say."""
    return _bytes(_REQUEST, error) or 0


def allocated(error: BaseException) -> int | None:
    """The bytes of all tensors on the GPU when an allocation failed; None if torch does not say."""
    return _bytes(_ALLOCATED, error)


def _bytes(pattern: re.Pattern[str], error: BaseException) -> int | None:
    found = pattern.search(" ".join(str(error).split()))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
