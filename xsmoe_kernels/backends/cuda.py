"""The CUDA kernels for NVIDIA GPUs: loads their library where torch has CUDA, and knows why it is not there.

    XSMOE_CUDA_LIBRARY    the library to load instead of the package's own; one that emulates CUDA on a CPU, for tests,
                          is loaded without CUDA too, and serves CPU tensors where `use_backend("cuda")` asks for it

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
    "its kernels have not been measured against Triton's on a GPU yet, so that they serve only where "
    'use_backend("cuda") asks for them'
)


class _Served(NamedTuple):
    """What serves an operator: its kernel in the library, or a Python function that launches several."""

    launcher: str | None = None
    launched: Mapping[str, str] = MappingProxyType({})
    """What that function needs of the library: schemas, by name."""
    dtypes: tuple[torch.dtype, ...] = DTYPES
    refuses: dispatch.Refuses | None = None


def _refuses_ranking(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return (
            "torch.backends.cuda.matmul.fp32_precision asks for tf32, and the cuda kernels multiply float32 as it is; "
            'set it to "ieee", or use_backend("triton")'
        )
    return item_scores.too_many_items(arguments[1], "cuda") if arguments else None


def _without_triton(device: torch.device, dtype: torch.dtype, *_: Any) -> str | None:
    reason = dispatch.unavailable("side_moe", "triton", device, dtype)
    return f"its matrix products are Triton's, and {reason}" if reason else None


SIDE_MOE_ROWS = {
    "side_moe_gate": "(Tensor[] x, Tensor[] router) -> Tensor[] gates",
    "side_moe_count": "(Tensor[] gates, Tensor[] squares, Tensor[] backbone_squares, Tensor?[] row_weight)"
    " -> (Tensor[] norm, Tensor[] gate)",
    "side_moe_logit_gradient": "(Tensor[] x, Tensor[] backbone, Tensor[] grad, Tensor[] gates, Tensor[] dots,"
    " Tensor[] backbone_dot, bool need_logits, bool need_backbone) -> (Tensor[] logits, Tensor[] backbone)",
}


def _side_moe(function: str) -> _Served:
    return _Served(f"ops.side_moe.cuda_launchers:{function}", SIDE_MOE_ROWS, refuses=_without_triton)


OPERATORS: dict[str, _Served] = {
    "route_topk": _Served(refuses=route_limits.refuses_forward),
    "route_topk_backward": _Served(refuses=route_limits.refuses_backward),
    "rank_of_target": _Served(dtypes=(torch.float32,), refuses=_refuses_ranking),
    "side_moe": _side_moe("forward"),
    "side_moe_backward": _side_moe("backward"),
    "side_moe_group": _side_moe("group_forward"),
    "side_moe_group_backward": _side_moe("group_backward"),
}

ALLOCATION = re.compile(r"aten::(new_empty|empty|contiguous|clone|to\b|_to_copy)")
"""What torch's stable ABI says of a call that allocates and has failed."""

library: Path | None = None
"""The library that is loaded, if one is."""


def load() -> None:
    """Loads the library, and registers its kernels with `dispatch` for the operators that are defined by now.

    Raises:
        ImportError: the library is there, but this torch or this version of xsmoe_kernels cannot use it; or
            `XSMOE_CUDA_LIBRARY` names no file.
    """
    global library
    named = shared_library.named("XSMOE_CUDA_LIBRARY")
    path = named or shared_library.FOLDER / LIBRARY
    if reason := None if named else _absence():
        for operator in OPERATORS:
            dispatch.declare_absent("cuda", reason, operator)
        return
    try:
        torch.ops.load_library(str(path))
        built = json.loads(torch.ops.xsmoe_cuda.build())
    except (OSError, AttributeError) as error:
        raise shared_library.unusable(path, f"cannot be loaded: {error.__cause__ or error}", None) from error
    devices = ("cuda", "cpu") if built["emulated"] else ("cuda",)
    for operator, served in OPERATORS.items():
        for name, schema in served.launched.items():
            if not hasattr(torch.ops.xsmoe_cuda, name) or _schema(name) != schema:
                raise _other_version(path, name, built["torch"])
        kernel = dispatch.when_needed(served.launcher) if served.launcher else _kernel(operator, path, built["torch"])
        kernel = _says_memory_is_short(operator, kernel)
        refuses = functools.partial(_refuses, tuple(built["architectures"]), served.refuses)
        dispatch.register(
            operator,
            "cuda",
            kernel,
            devices=devices,
            dtypes=served.dtypes,
            refuses=refuses,
            by_name_only=UNMEASURED,
        )
    library = path


def describe() -> dict[str, Any]:
    """What is loaded and how it was built, or why nothing is. JSON can hold it.

    Returns:
        "library", its file; "compiler", "flags" and "torch", what it was built with; "architectures", the GPUs that it
        was compiled for; "emulated", whether it is for tests on a CPU. Without a library: "unavailable", why.
    """
    if library is None:
        return {"unavailable": _absence()}
    return {"library": str(library), **json.loads(torch.ops.xsmoe_cuda.build())}


def _absence() -> str | None:
    """Why there is no library to load."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if (shared_library.FOLDER / LIBRARY).exists():
        return None
    return shared_library.absence("the CUDA kernels", FAILURE)


def _kernel(operator: str, path: Path, built: str) -> Callable[..., Any]:
    kernel = getattr(torch.ops.xsmoe_cuda, operator, None)
    if kernel is None or not shared_library.matches(kernel.default, getattr(torch.ops.xsmoe, operator).default):
        raise _other_version(path, operator, built)
    kernel = kernel.default
    return cast(Callable[..., Any], kernel)


def _schema(name: str) -> str:
    """What a function of the library takes and gives."""
    return str(getattr(torch.ops.xsmoe_cuda, name).default._schema).partition(name)[2]


def _says_memory_is_short(operator: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The same, whose failed allocations are torch's error for that: its stable ABI keeps the name of a call only."""

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
    return shared_library.unusable(path, f"belongs to another version of xsmoe_kernels, by its {kernel}", built)


def _refuses(
    architectures: tuple[str, ...],
    others: dispatch.Refuses | None,
    device: torch.device,
    dtype: torch.dtype,
    *arguments: Any,
) -> str | None:
    reason = None
    if device.type == "cuda":
        # Which GPU has no index may change, and a compiler that traces this warns of caches.
        known = device.index is not None and not torch.compiler.is_compiling()
        reason = (_known_not_for if known else _not_for)(device, architectures)
    return reason or (others(device, dtype, *arguments) if others else None)


def _not_for(device: torch.device, architectures: tuple[str, ...]) -> str | None:
    """Why code for these architectures does not run on a GPU; None if it does, or if there is none to ask."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if _runs_on(capability, architectures):
        return None
    return (
        f"the CUDA kernels were compiled for {', '.join(architectures)}, and {device} has "
        f"{'.'.join(map(str, capability))}; build them anew with that in TORCH_CUDA_ARCH_LIST"
    )


_known_not_for = functools.cache(_not_for)


def _runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether code for these architectures runs on a GPU of that capability."""
    for name in architectures:
        major, minor, variant = re.fullmatch(r"(\d+)\.(\d)([af]?)(?:\+PTX)?", name).groups()  # type: ignore[union-attr]
        compiled = int(major), int(minor)
        if compiled == capability:
            return True
        # Machine code runs on later ones of its generation, PTX on all that came later; of the variants, "a" on nothing
        # else, and "f" as machine code does.
        anywhere = name.endswith("+PTX") and not variant
        if variant != "a" and compiled < capability and (anywhere or compiled[0] == capability[0]):
            return True
    return False
