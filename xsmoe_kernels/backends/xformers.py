"""xformers' attention for NVIDIA GPUs: register it without importing xformers, or the reason why it is unavailable."""

import importlib.metadata
import re

import torch

from xsmoe_kernels.runtime import dispatch

OLDEST = (0, 0, 35)
MODULE = "ops.packed_attention.xformers_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load() -> None:
    """Register the kernels with `dispatch`, or the reason why there are none."""
    reason = _missing_reason()
    for name in ("forward", "backward"):
        operator = "packed_attention" + ("_backward" if name == "backward" else "")
        if reason is not None:
            dispatch.set_unavailable("cuda", reason, operator)
            continue
        dispatch.register(
            operator,
            "cuda",
            dispatch.lazy_import(f"{MODULE}:{name}"),
            devices=("cuda",),
            dtypes=DTYPES,
            rejects=dispatch.lazy_import(f"{MODULE}:rejects_{name}"),
        )


def _missing_reason() -> str | None:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    try:
        version = importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        return "xformers is not installed; `pip install xformers`"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < OLDEST:
        return f"xformers {version} is older than {'.'.join(map(str, OLDEST))}; `pip install --upgrade xformers`"
    return None
