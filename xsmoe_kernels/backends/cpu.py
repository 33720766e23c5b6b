"""CPU backend ("native"): load the library of C++ kernels and register them, or the reason why there are none.

    XSMOE_NATIVE_LIBRARY    the library to load instead of the package's own, for example one built with sanitizers
    XSMOE_CPU_TIER          the instruction set to use, instead of the best one that the processor supports: baseline,
                            avx2, avx512, avx512_bf16 or amx

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
"""The loaded library, or None."""


def load() -> None:
    """Load the library and register its kernels with `dispatch` for the operators that are defined by now.

    Raises:
        ImportError: the library exists, but this torch or this version of xsmoe_kernels cannot use it; or
            `XSMOE_NATIVE_LIBRARY` is not a file; or the processor does not support the instruction set that
            `XSMOE_CPU_TIER` names.
    """
    global library
    path = shared_library.path_from("XSMOE_NATIVE_LIBRARY") or shared_library.FOLDER / LIBRARY
    if not path.exists():
        dispatch.set_unavailable("native", _missing_reason())
        return
    try:
        torch.ops.load_library(str(path))
        cpu_tier = torch.ops.xsmoe_native.cpu_tier
        _ = torch.ops.xsmoe_native.supported_tiers, torch.ops.xsmoe_native.cpu_features  # older libraries have neither
    except (OSError, AttributeError) as error:
        raise _load_error(path, f"cannot be loaded: {error.__cause__ or error}") from error
    try:
        cpu_tier()
    except RuntimeError as error:
        raise ImportError(str(error)) from None
    for operator in dispatch.operators():
        if hasattr(torch.ops.xsmoe_native, operator):
            kernel = getattr(torch.ops.xsmoe_native, operator).default
            if not shared_library.matches(kernel, getattr(torch.ops.xsmoe, operator).default):
                raise _load_error(
                    path, f"belongs to another version of xsmoe_kernels: its arguments of {operator} are different"
                )
            dispatch.register(operator, "native", kernel, devices=("cpu",), dtypes=DTYPES)
    library = path


def describe() -> dict[str, Any]:
    """Return what is loaded, how it was built and what the processor supports, or why nothing is loaded; JSON values.

    Returns:
        "library", its file; "tier", the instructions in use, and "tiers", all that run here; "compiled", for each
        compiled level its flags, and "left_out", the levels that the build lacks; "compiler", "flags" and
        "torch", what it was built with; "features", those of the processor. What the build wrote next to the library
        is None if that file is missing. Without a library: "unavailable", why.
    """
    if library is None:
        return {"unavailable": _missing_reason()}
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


def _missing_reason() -> str:
    """Return why there is no library."""
    return shared_library.missing_reason("the native kernels", FAILURE)


def _load_error(path: Path, problem: str) -> ImportError:
    return shared_library.load_error(path, problem, _built(path).get("torch"))


def _built(path: Path) -> dict[str, Any]:
    """Return the facts that the build wrote next to a library; nothing if they are missing."""
    facts = path.with_suffix(".json")
    return json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
