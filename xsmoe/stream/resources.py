"""Measurement of wall time and peak memory, and the available host memory."""

import os
import resource
import sys
import time
from pathlib import Path

import torch

MIB = 1 << 20


class Stopwatch:
    """Measures the time since its creation and the process's peak memory.

    Args:
        device: if this is a CUDA device, `read` synchronizes it first and also returns its allocator's peak.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return the seconds, the process's peak resident memory in MiB, and on CUDA the allocator's peak in MiB."""
        reading = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            reading["cuda_peak_mib"] = torch.cuda.max_memory_allocated(self.device) / MIB
        # Linux reports kilobytes, macOS bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"seconds": time.perf_counter() - self._start, "peak_rss_mib": peak / MIB, **reading}


def available_memory() -> int:
    """Return the host memory available without swapping, in bytes. The limit of the control group is respected."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found = [int(fields["MemAvailable"].split()[0]) * 1024]
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        found.append(int(limit) - int((group / "memory.current").read_text()))
    return max(0, min(found))
