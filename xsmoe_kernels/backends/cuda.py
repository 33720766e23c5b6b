"""CUDA backend for NVIDIA GPUs: load the library of kernels and register them, or the reason why there are none.

    XSMOE_CUDA_LIBRARY    the library to load instead of the package's own. One that emulates CUDA on a CPU, for tests,
                          is loaded without CUDA too. It runs on CPU tensors if `use_backend("cuda")` selects it.

It is read when xsmoe_kernels is imported.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch

from xsmoe_kernels.backends import shared_library
from xsmoe_kernels.ops.route_topk import limits as route_limits
from xsmoe_kernels.ops.scoring import item_scores
from xsmoe_kernels.runtime import dispatch

LIBRARY = "libxsmoe_cuda.so"
FAILURE = "_cuda_build_failure.txt"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNMEASURED = (
    "its kernels have not been compared with Triton's on a GPU yet, so that they run only where "
    'use_backend("cuda") requests them'
)


class _Kernel(NamedTuple):
    """The kernel of an operator: the one in the library, or a Python function that launches several."""

    launcher: str | None = None
    launched: Mapping[str, str] = MappingProxyType({})
    """The functions of the library that the launcher calls: their schemas, by name."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    rejects: dispatch.Rejects | None = None


def _rejects_ranking(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return (
            "torch.backends.cuda.matmul.fp32_precision is tf32, but the cuda kernels multiply in full float32; "
            'set it to "ieee", or use_backend("triton")'
        )
    return item_scores.too_many_items(arguments[1], "cuda") if arguments else None


def _without_triton(device: torch.device, dtype: torch.dtype, *_: Any) -> str | None:
    reason = dispatch.unavailable_reason("side_moe", "triton", device, dtype)
    return f"its matrix products run on Triton, and {reason}" if reason else None


SIDE_MOE_ROWS = {
    "side_moe_gate": "(Tensor[] x, Tensor[] router) -> Tensor[] gates",
    "side_moe_count": "(Tensor[] gates, Tensor[] squares, Tensor[] backbone_squares, Tensor?[] row_weight)"
    " -> (Tensor[] norm, Tensor[] gate)",
    "side_moe_logit_gradient": "(Tensor[] x, Tensor[] backbone, Tensor[] grad, Tensor[] gates, Tensor[] dots,"
    " Tensor[] backbone_dot, bool need_logits, bool need_backbone) -> (Tensor[] logits, Tensor[] backbone)",
}


def _side_moe(function: str) -> _Kernel:
    return _Kernel(f"ops.side_moe.cuda_launchers:{function}", SIDE_MOE_ROWS, rejects=_without_triton)


OPERATORS: dict[str, _Kernel] = {
    "route_topk": _Kernel(rejects=route_limits.rejects_forward),
    "route_topk_backward": _Kernel(rejects=route_limits.rejects_backward),
    "rank_of_target": _Kernel(dtypes=(torch.float32,), rejects=_rejects_ranking),
    "side_moe": _side_moe("forward"),
    "side_moe_backward": _side_moe("backward"),
    "side_moe_group": _side_moe("group_forward"),
    "side_moe_group_backward": _side_moe("group_backward"),
}

ALLOCATION = re.compile(r"aten::(new_empty|empty|contiguous|clone|to\b|_to_copy)")
"""Calls in the messages of torch's stable ABI that fail when an allocation does."""

library: Path | None = None
"""The loaded library, or None."""


def load() -> None:
    """Load the library and register its kernels with `dispatch` for the operators that are defined by now.

    Raises:
        ImportError: the library exists, but this torch or this version of xsmoe_kernels cannot use it; or
            `XSMOE_CUDA_LIBRARY` is not a file.
    """
    global library
    named = shared_library.path_from("XSMOE_CUDA_LIBRARY")
    path = named or shared_library.FOLDER / LIBRARY
    if reason := None if named else _missing_reason():
        for operator in OPERATORS:
            dispatch.set_unavailable("cuda", reason, operator)
        return
    try:
        torch.ops.load_library(str(path))
        built = json.loads(torch.ops.xsmoe_cuda.build())
    except (OSError, AttributeError) as error:
        raise shared_library.load_error(path, f"cannot be loaded: {error.__cause__ or error}", None) from error
    devices = ("cuda", "cpu") if built["emulated"] else ("cuda",)
    for operator, declared in OPERATORS.items():
        for name, schema in declared.launched.items():
            if not hasattr(torch.ops.xsmoe_cuda, name) or _schema(name) != schema:
                raise _other_version(path, name, built["torch"])
        kernel = (
            dispatch.lazy_import(declared.launcher)
            if declared.launcher
            else _library_kernel(operator, path, built["torch"])
        )
        kernel = _with_out_of_memory_error(operator, kernel)
        rejects = functools.partial(_rejects, tuple(built["architectures"]), declared.rejects)
        dispatch.register(
            operator,
            "cuda",
            kernel,
            devices=devices,
            dtypes=declared.dtypes,
            rejects=rejects,
            explicit_only=UNMEASURED,
        )
    library = path


def describe() -> dict[str, Any]:
    """Return what is loaded and how it was built, or why nothing is loaded; JSON values.

    Returns:
        "library", its file; "compiler", "flags" and "torch", what it was built with; "architectures", the GPUs that it
        was compiled for; "emulated", whether it is for tests on a CPU. Without a library: "unavailable", the reason.
    """
    if library is None:
        return {"unavailable": _missing_reason()}
    return {"library": str(library), **json.loads(torch.ops.xsmoe_cuda.build())}


def _missing_reason() -> str | None:
    """Return why there is no library to load."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if (shared_library.FOLDER / LIBRARY).exists():
        return None
    return shared_library.missing_reason("the CUDA kernels", FAILURE)


def _library_kernel(operator: str, path: Path, built: str) -> Callable[..., Any]:
    kernel = getattr(torch.ops.xsmoe_cuda, operator, None)
    if kernel is None or not shared_library.matches(kernel.default, getattr(torch.ops.xsmoe, operator).default):
        raise _other_version(path, operator, built)
    kernel = kernel.default
    return cast(Callable[..., Any], kernel)


def _schema(name: str) -> str:
    """Return the schema of a function of the library."""
    return str(getattr(torch.ops.xsmoe_cuda, name).default._schema).partition(name)[2]


def _with_out_of_memory_error(operator: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that raises torch's error for failed allocations; the stable ABI reports only the failed call."""

    def run(*arguments: Any) -> Any:
        try:
            return kernel(*arguments)
        except RuntimeError as error:
            if ALLOCATION.search(str(error)) is None:
                raise
            raise torch.OutOfMemoryError(
                f"the cuda kernels of {operator} could not allocate their results or scratch: {error}"
            ) from error

    return run


def _other_version(path: Path, kernel: str, built: str) -> ImportError:
    return shared_library.load_error(
        path, f"belongs to another version of xsmoe_kernels: its schema of {kernel} is different", built
    )


def _rejects(
    architectures: tuple[str, ...],
    others: dispatch.Rejects | None,
    device: torch.device,
    dtype: torch.dtype,
    *arguments: Any,
) -> str | None:
    reason = None
    if device.type == "cuda":
        # A device without an index may mean another GPU later, and a compiler that traces this warns of caches.
        known = device.index is not None and not torch.compiler.is_compiling()
        reason = (_cached_architecture_reason if known else _architecture_reason)(device, architectures)
    return reason or (others(device, dtype, *arguments) if others else None)


def _architecture_reason(device: torch.device, architectures: tuple[str, ...]) -> str | None:
    """Return why code for these architectures does not run on a GPU; None if it does, or if there is no GPU."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if _runs_on(capability, architectures):
        return None
    return (
        f"the CUDA kernels were compiled for {', '.join(architectures)}, and {device} has "
        f"{'.'.join(map(str, capability))}; build them again with that in TORCH_CUDA_ARCH_LIST"
    )


_cached_architecture_reason = functools.cache(_architecture_reason)


def _runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Return whether code for these architectures runs on a GPU of that capability."""
    for name in architectures:
        major, minor, variant = re.fullmatch(r"(\d+)\.(\d)([af]?)(?:\+PTX)?", name).groups()  # type: ignore[union-attr]
        compiled = int(major), int(minor)
        if compiled == capability:
            return True
        # Machine code runs on later GPUs of its generation, and PTX on all later GPUs. The variant "a" runs on no other
        # GPU, and "f" runs where machine code does.
        anywhere = name.endswith("+PTX") and not variant
        if variant != "a" and compiled < capability and (anywhere or compiled[0] == capability[0]):
            return True
    return False
