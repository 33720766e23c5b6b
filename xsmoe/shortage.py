"""Which errors say that a device's memory does not suffice."""

import torch

# torch has no class of its own for what its CPU allocator says, on Linux and on Windows, and C++'s.
_SAID = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")


def is_shortage(error: BaseException) -> bool:
    """Whether an allocation of torch or of NumPy failed, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)
