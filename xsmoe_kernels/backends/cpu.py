"""CPU backend ("native"): load the library of C++ kernels and register them, or the reason why there are none.

    XSMOE_NATIVE_LIBRARY    the library to load instead of the package's own, for example one built with sanitizers
    XSMOE_CPU_TIER          the instruction set to use, instead of the best one that the processor supports: baseline,
                            avx2, avx512, avx512_bf16 or amx

Both are read when xsmoe_kernels is imported.
"""

import functools
import importlib.machinery
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from xsmoe_kernels.backends import shared_library
from xsmoe_kernels.runtime import dispatch

LIBRARY = "libxsmoe_cpu.so"
FACTS = "_build_facts"
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
        compiled tier its flags, and "left_out", the tiers that the build has not; "compiler", "flags" and
        "torch", what it was built with; "features", those of the processor. All but the first two are None where
        another Python built the library, for the facts are a module of that one. Without a library: "unavailable", why.
    """
    if library is None:
        return {"unavailable": _missing_reason()}
    facts = _facts(library)
    built = _build(facts)
    return {
        "library": str(library),
        "tier": torch.ops.xsmoe_native.cpu_tier(),
        "tiers": facts and facts.supported_tiers(),
        "compiled": built.get("tiers"),
        "left_out": built.get("left_out"),
        "compiler": built.get("compiler"),
        "flags": built.get("flags"),
        "torch": built.get("torch"),
        "features": facts and facts.cpu_features(),
    }


def _missing_reason() -> str:
    """Return why there is no library."""
    return shared_library.missing_reason("the native kernels", FAILURE)


def _load_error(path: Path, problem: str) -> ImportError:
    return shared_library.load_error(path, problem, _build(_facts(path)).get("torch"))


@functools.cache
def _facts(path: Path) -> ModuleType | None:
    """The module of build facts beside a library, if there is one for this Python."""
    module = path.with_name(FACTS + importlib.machinery.EXTENSION_SUFFIXES[0])
    if not module.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"xsmoe_kernels.{FACTS}", module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _build(facts: ModuleType | None) -> dict[str, Any]:
    return {} if facts is None else json.loads(facts.build())
