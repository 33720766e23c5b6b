"""The native kernels for CPUs: loads their library, registers what it holds, and knows why it is not there.

    XSMOE_NATIVE_LIBRARY    the library to load instead of the package's own, for example one built with sanitizers
    XSMOE_CPU_TIER          the instructions to use, instead of the best that the processor has: baseline, avx2, avx512,
                            avx512_bf16 or amx

Both are read when xsmoe_kernels is imported.
"""

import json
from pathlib import Path
from typing import Any

import torch

from xsmoe_kernels.backends import shared_library
from xsmoe_kernels.runtime import dispatch

LIBRARY = "libxsmoe_cpu.so"
FAILURE = "_build_failure.txt"
DTYPES = (torch.float32, torch.bfloat16)

library: Path | None = None
"""The library that is loaded, if one is."""


def load() -> None:
    """Loads the library, and registers its kernels with `dispatch` for the operators that are defined by now.

    Raises:
        ImportError: the library is there, but this torch or this version of xsmoe_kernels cannot use it; or
            `XSMOE_NATIVE_LIBRARY` names no file, or `XSMOE_CPU_TIER` no tier that can run.
    """
    global library
    path = shared_library.named("XSMOE_NATIVE_LIBRARY") or shared_library.FOLDER / LIBRARY
    if not path.exists():
        dispatch.declare_absent("native", _absence())
        return
    try:
        torch.ops.load_library(str(path))
        cpu_tier = torch.ops.xsmoe_native.cpu_tier
        _ = torch.ops.xsmoe_native.supported_tiers, torch.ops.xsmoe_native.cpu_features  # older libraries have neither
    except (OSError, AttributeError) as error:
        raise _unusable(path, f"cannot be loaded: {error.__cause__ or error}") from error
    try:
        cpu_tier()
    except RuntimeError as error:
        raise ImportError(str(error)) from None
    for operator in dispatch.operators():
        if hasattr(torch.ops.xsmoe_native, operator):
            kernel = getattr(torch.ops.xsmoe_native, operator).default
            if not shared_library.matches(kernel, getattr(torch.ops.xsmoe, operator).default):
                raise _unusable(path, f"belongs to another version of xsmoe_kernels, by its arguments of {operator}")
            dispatch.register(operator, "native", kernel, devices=("cpu",), dtypes=DTYPES)
    library = path


def describe() -> dict[str, Any]:
    """What is loaded, how it was built and what the processor has; or why nothing is loaded. JSON can hold it.

    Returns:
        "library", its file; "tier", the instructions in use, and "tiers", all that run here; "compiled", for each
        compiled tier its flags, and "left_out", the tiers that the build has not; "compiler", "flags" and
        "torch", what it was built with; "features", those of the processor. What the build wrote next to the library
        is None if that file is missing. Without a library: "unavailable", why.
    """
    if library is None:
        return {"unavailable": _absence()}
    built = _built(library)
    return {
        "library": str(library),
        "tier": torch.ops.xsmoe_native.cpu_tier(),
        "tiers": torch.ops.xsmoe_native.supported_tiers(),
        "compiled": built.get("tiers"),
        "left_out": built.get("left_out"),
        "compiler": built.get("compiler"),
        "flags": built.get("flags"),
        "torch": built.get("torch"),
        "features": torch.ops.xsmoe_native.cpu_features(),
    }


def _absence() -> str:
    """Why there is no library."""
    return shared_library.absence("the native kernels", FAILURE)


def _unusable(path: Path, problem: str) -> ImportError:
    return shared_library.unusable(path, problem, _built(path).get("torch"))


def _built(path: Path) -> dict[str, Any]:
    """Return the facts that the build wrote next to a library; nothing if they are missing."""
    facts = path.with_suffix(".json")
    return json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
