"""Report versions, devices, and the backend of each operator."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from xsmoe_kernels.backends import cpu as cpu_backend
from xsmoe_kernels.backends import cuda as cuda_backend
from xsmoe_kernels.runtime import dispatch

__version__ = "0.2.0"


def info() -> dict[str, Any]:
    """Return versions, devices and backends as a dict that JSON can represent. Attach it to problem reports.

    Returns:
        "versions": of xsmoe_kernels, python, torch and the CUDA it was built for, triton and xformers; None for what is
            not installed. Triton is not imported, and xformers only to ask what it supports on an existing CUDA device.
        "devices": "cpu" (architecture, vector instructions that torch uses, threads) and "cuda" (for each GPU its name,
            compute capability and bytes of memory).
        "native": the result of `cpu_backend.describe`: "tier", the instruction set in use, "tiers", all that run here,
            "compiler", "flags", "torch" and more about the build; or "unavailable", why there are no kernels.
        "cuda_kernels": the result of `cuda_backend.describe`: "architectures", "compiler", "torch" and more about the
            build; or "unavailable", why there are no kernels.
        "requested": the backend that `use_backend` requests, else "auto".
        "operators": for each operator, backward ones included, and each device type: "backend", the one that runs
            float32 under "auto"; "unavailable", for each backend that cannot run it the reason; "by_name", for each
            backend that only `use_backend` selects the reason.
    """
    return {
        "versions": {
            "xsmoe_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _installed("triton"),
            "xformers": _installed("xformers"),
        },
        "devices": {"cpu": _cpu(), "cuda": [_gpu(index) for index in range(torch.cuda.device_count())]},
        "native": cpu_backend.describe(),
        "cuda_kernels": cuda_backend.describe(),
        "requested": dispatch.requested(),
        "operators": {
            operator: {device: _backends_of(operator, device) for device in dispatch.PREFERENCE}
            for operator in dispatch.operators()
        },
    }


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {
        "architecture": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "memory": properties.total_memory,
    }


def _backends_of(operator: str, device: str) -> dict[str, Any]:
    if device == "cuda" and (absent := dispatch.no_gpu_reason()) is not None:
        return {"backend": None, "unavailable": dict.fromkeys(dispatch.BACKENDS, absent), "by_name": {}}
    reasons = {
        backend: dispatch.unavailable_reason(operator, backend, device, torch.float32) for backend in dispatch.BACKENDS
    }
    return {
        "backend": dispatch.select(operator, "auto", torch.device(device), torch.float32),
        "unavailable": {backend: reason for backend, reason in reasons.items() if reason is not None},
        "by_name": {
            backend: why
            for backend, reason in reasons.items()
            if reason is None and (why := dispatch.explicit_only(operator, backend)) is not None
        },
    }
