"""Block sizes of Triton kernels: fixed by architecture and precision, or autotuned on request.

    XSMOE_AUTOTUNE=1    the first launch of a kernel for a key times its candidates; the fastest is stored on disk
    XSMOE_CACHE         the folder of that file; by default xsmoe in $XDG_CACHE_HOME, or in ~/.cache

Both are read at each launch. Unless the first is set, no file is read or written.
"""

import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from xsmoe_kernels.runtime import dispatch
from xsmoe_kernels.triton_utils import tuning_cache

Result = TypeVar("Result")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Architectures with their own configurations. Other NVIDIA GPUs use those of sm_80, other AMD GPUs gfx942's."""
PRECISIONS = ("half", "tf32", "ieee")
"""Precisions of products: 16-bit operands, float32 rounded to 19 bits, full float32."""
FEWEST_ROWS = 256
"""Launches with fewer rows are not tuned: their fastest configuration says little about many rows."""


@dataclass(frozen=True)
class Config:
    """Block sizes and compile options of a kernel.

    Attributes:
        blocks: block sizes, by the names of the kernel's arguments.
        num_warps: warps of a program.
        num_stages: the depth of the pipeline of loads.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class Table:
    """The configurations of a kernel.

    Attributes:
        kernel: its name, which begins with the operator's.
        defaults: the configuration for (architecture, precision).
        interpreted: the one for Triton's interpreter, small, so that small inputs have several blocks.
        candidates: further ones for tuning; those that do not fit the device are skipped.
    """

    kernel: str
    defaults: Mapping[tuple[str, str], Config]
    interpreted: Config
    candidates: tuple[Config, ...] = field(default=())


def make_config(names: str, sizes: str, num_warps: int, num_stages: int) -> Config:
    """Return a Config whose blocks have these names and sizes, both separated by spaces."""
    return Config(dict(zip(names.split(), map(int, sizes.split()), strict=True)), num_warps, num_stages)


def everywhere(config: Config, *precisions: str) -> dict[tuple[str, str], Config]:
    """Return one configuration for all architectures and these precisions; all precisions if none is named."""
    return {(name, precision): config for name in ARCHITECTURES for precision in precisions or PRECISIONS}


_chosen: dict[tuple[Any, ...], Config] = {}
"""Choices that were tuned or read from the file in this process."""
_not_on_disk: set[tuple[Any, ...]] = set()
"""Keys that the file does not contain, so that launches that cannot tune do not read it again."""
_tuning = threading.Lock()
"""Backward runs in its own threads, and two that tune at once would disturb each other's times."""


def run(
    table: Table, like: torch.Tensor, precision: str, key: Mapping[str, int], launch: Callable[[Config], Result]
) -> Result:
    """Call `launch` with the configuration for a tensor's device and dtype.

    Args:
        table: the kernel's configurations.
        like: a tensor on the device, of the products' dtype, with as many rows as the launch has.
        precision: of products, from `kernel_helpers.precision`.
        key: sizes that a tuned choice depends on, D and R; never the number of rows or experts.
        launch: called several times when tuning; the last result is returned.
    """
    if table.candidates and like.device.type != "cpu" and os.environ.get("XSMOE_AUTOTUNE") == "1":
        return launch(_tuned(table, like, precision, key, launch))
    return launch(default(table, like, precision))


def default(table: Table, like: torch.Tensor, precision: str) -> Config:
    """Return the fixed configuration for a tensor's device and dtype."""
    if like.device.type == "cpu":
        return table.interpreted
    return table.defaults[architecture(like.device), precision if like.dtype == torch.float32 else "half"]


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the architecture whose configurations a GPU uses.

    Raises:
        BackendUnavailable: the GPU is too old for the kernels.
    """
    if torch.version.hip is not None:
        return "gfx942"
    if reason := too_old(device):
        raise dispatch.BackendUnavailable(reason)
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def too_old(device: torch.device) -> str | None:
    """Return why a device is too old for the kernels; None if it is not, or if there is no GPU."""
    if device.type != "cuda":
        return None
    # A device without an index may mean another GPU later, and a compiler that traces this warns of caches.
    if device.index is None or torch.compiler.is_compiling():
        return _too_old(device)
    return _cached_too_old(device)


def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return (
        f"the GPU kernels need compute capability 8.0 or newer, but {device} has {major}.{minor}; "
        'use_backend("reference") runs on any GPU'
    )


_cached_too_old = functools.cache(_too_old)


def folder() -> Path:
    """Return the folder of the tuning cache."""
    if given := os.environ.get("XSMOE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xsmoe"


def forget() -> None:
    """Clear the choices of this process, but not the file."""
    _chosen.clear()
    _not_on_disk.clear()


def median_seconds(launch: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a launch on the device, with a cold second-level cache."""
    from triton.testing import do_bench

    with torch.cuda.device(device):
        return float(do_bench(launch, warmup=10, rep=50, return_mode="median")) / 1e3


def capturing() -> bool:
    """Return whether launches are captured into a CUDA graph, where they cannot be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def device_name(device: torch.device) -> str:
    """Return the product name of a GPU."""
    return torch.cuda.get_device_name(device)


def _tuned(
    table: Table, like: torch.Tensor, precision: str, key: Mapping[str, int], launch: Callable[[Config], Result]
) -> Config:
    known = (table.kernel, like.device, like.dtype, precision, *key.items())
    if (config := _chosen.get(known)) is not None:
        return config
    usual = default(table, like, precision)
    only_known = like.shape[0] < FEWEST_ROWS or capturing()
    if only_known and known in _not_on_disk:
        return usual
    configs = [usual, *(config for config in table.candidates if config != usual)]
    with _tuning:
        if (config := _chosen.get(known)) is not None:
            return config
        entry = _entry(table, like, precision, key)
        read = tuning_cache.read(folder()).get(entry)
        config = next((config for config in configs if _as_json(config) == read), None)
        if config is None and only_known:
            _not_on_disk.add(known)
            return usual
        if config is None:
            config = _best(configs, launch, like.device)
            tuning_cache.add(folder(), entry, _as_json(config))
        _chosen[known] = config
    return config


def _best(configs: list[Config], launch: Callable[[Config], Result], device: torch.device) -> Config:
    times: list[tuple[float, int]] = []
    failure: Exception | None = None
    for place, config in enumerate(configs):
        try:
            times.append((median_seconds(functools.partial(launch, config), device), place))
        except Exception as error:
            if not _does_not_fit(error):
                raise
            failure = failure or error
    if not times and failure is not None:
        raise failure
    return configs[min(times)[1]]


def _does_not_fit(error: Exception) -> bool:
    """Return whether Triton failed to compile or load a kernel: too much shared memory, or a failed pass or ptxas."""
    return type(error).__module__.partition(".")[0] == "triton" or "PassManager" in str(error)


def _entry(table: Table, like: torch.Tensor, precision: str, key: Mapping[str, int]) -> str:
    """Return the key of a choice; a change of the kernel, table or compiler gives another key."""
    import triton

    return " | ".join(
        (
            table.kernel,
            device_name(like.device),
            f"{str(like.dtype).removeprefix('torch.')} {precision}",
            " ".join(f"{name}={size}" for name, size in sorted(key.items())),
            f"triton {triton.__version__}",
            _fingerprint(table),
        )
    )


def _fingerprint(table: Table) -> str:
    """Return a hash of the configurations and of the operator's sources."""
    configs = [f"{place}: {_as_json(config)}" for place, config in sorted(table.defaults.items())]
    configs += [str(_as_json(config)) for config in table.candidates]
    digest = hashlib.sha256("\n".join(configs).encode())
    digest.update(_sources(table.kernel.partition(".")[0]))
    return digest.hexdigest()[:12]


@functools.cache
def _sources(operator: str) -> bytes:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    shared = (package / name for name in ("triton_utils/kernel_helpers.py", "ops/scoring/triton_scores.py"))
    for path in (*shared, *sorted((package / "ops" / operator).rglob("*.py"))):
        with contextlib.suppress(OSError):
            digest.update(path.read_bytes())
    return digest.digest()


def _as_json(config: Config) -> dict[str, Any]:
    return {"blocks": dict(config.blocks), "num_warps": config.num_warps, "num_stages": config.num_stages}
