"""The machine that the numbers come from."""

import datetime
import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

import xsmoe_kernels

ROOT = Path(__file__).parents[2]
BUSY = "**Other programs use this machine: ratios are more reliable than times, and neither much.**"
# Prefixes of environment variables that change times.
_VARIABLES = (
    "OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "XSMOE_", "ONEDNN_", "DNNL_", "TORCHINDUCTOR_", "CUDA_VISIBLE",
    "CUDA_LAUNCH_BLOCKING", "CUBLAS_", "NVIDIA_TF32_OVERRIDE", "PYTORCH_", "TRITON_",
)  # fmt: skip
_GPU_FIELDS = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "temperature.gpu",
)  # fmt: skip
_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def describe(device: torch.device) -> dict[str, Any]:
    """Return processor, memory, versions, settings and date, for JSON; `info` is that of xsmoe_kernels."""
    info = xsmoe_kernels.info()
    # A local path.
    info["native"].pop("library", None)
    maps = _read("/proc/self/maps") or ""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "device": device.type,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "memory_bytes": _meminfo("MemTotal"),
        "allocator": next((name for name in _ALLOCATORS if name in maps), "system"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "mkl": torch.backends.mkl.is_available(),
            "onednn": torch.backends.mkldnn.is_available(),
        },
        "info": info,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "triton": info.get("versions", {}).get("triton"),
            # Not allow_tf32: reading it raises once fp32_precision has been set.
            "fp32_precision": getattr(torch.backends.cuda.matmul, "fp32_precision", None),
            **_nvidia_smi(getattr(properties, "uuid", None)),
        }
    return facts


def line(machine: dict[str, Any]) -> str:
    """Return the facts in one line."""
    cpu, versions, info = machine["cpu"], machine["versions"], machine["info"]
    parts = [f"{cpu['model']}, {cpu['cores']} cores, {machine['threads']} threads"]
    if cpu["mhz"]:
        parts[0] += f" at {cpu['mhz']:.0f} MHz"
    if machine["memory_bytes"]:
        parts.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB")
    level = info.get("native", {}).get("tier", "no native kernels")
    parts.append(f"instruction sets: torch {cpu['capability']}, ours {level}")
    if gpu := machine.get("gpu"):
        driver = f", driver {gpu['driver_version']}" if gpu.get("driver_version") else ""
        clock = f", at {gpu['clocks.sm']} of {gpu['clocks.max.sm']} MHz" if gpu.get("clocks.sm") else ""
        parts.insert(0, f"{gpu['name']}, CUDA {gpu['cuda']}{driver}{clock}, Triton {gpu.get('triton') or 'absent'}")
    parts += [f"torch {versions['torch']}, Python {versions['python']}", f"commit {machine['commit']}"]
    if machine["load"] is not None:
        parts.append(f"load {machine['load'][0]:.1f}")
    return "; ".join([*parts, machine["date"]])


def busy(machine: dict[str, Any]) -> bool:
    """Return whether other programs used more than a quarter of the cores in the last minute."""
    return machine["load"] is not None and machine["load"][0] > 0.25 * machine["cpu"]["cores"]


def available_memory(device: torch.device) -> int | None:
    """Return the free bytes of memory on the device, or None if they are unknown."""
    if device.type == "cuda":
        # The cached memory of torch's allocator is free for us.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int | None:
    """Return a field of /proc/meminfo in bytes, or None if there is none."""
    for row in (_read("/proc/meminfo") or "").splitlines():
        name, _, amount = row.partition(":")
        if name == field:
            return int(amount.split()[0]) << 10
    return None


def _nvidia_smi(uuid: object) -> dict[str, str | None]:
    """Return facts from the driver, which are only read; None for unknown ones."""
    which = [] if uuid is None else [f"--id=GPU-{uuid}"]
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    output = _output(["nvidia-smi", *which, query, "--format=csv,noheader,nounits"]) or ""
    values = [value.strip() for value in output.partition("\n")[0].split(",")]
    found = values if len(values) == len(_GPU_FIELDS) else [""] * len(_GPU_FIELDS)
    return {name: value if value and value[0] != "[" else None for name, value in zip(_GPU_FIELDS, found, strict=True)}


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    clocks = []
    for row in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = (part.strip() for part in row.partition(":"))
        fields.setdefault(name, value)
        if name == "cpu MHz":
            clocks.append(float(value))
    model = fields.get("model name", platform.processor() or platform.machine())
    if "model" in fields:
        model += f" (family {fields.get('cpu family', '?')}, model {fields['model']})"
    return {
        "model": model,
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "mhz": max(clocks, default=None),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))],
        "cache": fields.get("cache size"),
    }


def _commit() -> str:
    # Set on machines that have the sources without their git history.
    if given := os.environ.get("GPU_SUITE_COMMIT"):
        return given
    git = ["git", "-C", str(ROOT)]
    commit = _output([*git, "rev-parse", "--short=12", "HEAD"])
    # Results do not change what is measured, and a run may be writing there.
    changed = _output([*git, "status", "--porcelain", "--", ":/", ":!/bench/results"])
    if commit is None or changed is None:
        return "unknown"
    return commit.strip() + (" with changes" if changed.strip() else "")


@functools.cache
def _load() -> list[float] | None:
    """Return the load before the first measurement. Later it would be that of this process."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _output(command: Sequence[str]) -> str | None:
    """Return a command's output, or None if it fails."""
    try:
        return subprocess.run(list(command), capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
